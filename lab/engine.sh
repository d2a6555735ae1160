#!/bin/sh
# Gets the Docker Engine of a release of Debian, such as trixie: its programs alone, into build/engines/RELEASE, where a
# second run finds them. apt reads that release's lists in a folder of their own and checks their signatures, so nothing of
# the machine's changes. Says nothing but that folder on stdout; or why there is no such engine, and exits with 77.
set -eu
cd "$(dirname "$0")/.."
. lab/apt.sh
exec 3>&1 >&2
release=$1
shift # what remains are the programs
engines=$PWD/build/engines
folder=$engines/$release
keys=/usr/share/keyrings/debian-archive-keyring.gpg

skip() { echo "$*" >&3; exit 77; }

# Without the machine's sources, preferences and lists.
of_release() {
    program=$1
    shift
    "$program" -qq -o Dir::Etc::SourceList="$new/sources.list" -o Dir::Etc::SourceParts=- -o Dir::State::Lists="$new/lists" \
        -o Dir::Cache="$new/cache" -o APT::Sandbox::User=root -o Acquire::Languages=none "$@"
}

fetch() {
    say "fetching Docker of Debian $release"
    mkdir -p "$new/lists/partial" "$new/cache"
    echo "deb [signed-by=$keys] http://deb.debian.org/debian $release main" >"$new/sources.list"
    of_release apt-get update --error-on=any || skip "apt cannot read Debian $release: see above"
    packages="docker.io/$release containerd/$release"
    ! of_release apt-cache show docker-cli >/dev/null 2>&1 || packages="$packages docker-cli/$release" # since Debian 13
    # shellcheck disable=SC2086 # one argument for each package
    (cd "$new" && of_release apt-get download $packages) || skip "Debian $release has no Docker Engine: see above"
}

take_programs() {
    mkdir "$new/files" "$new/programs"
    for deb in "$new"/*.deb; do
        dpkg-deb --fsys-tarfile "$deb" | tar -x -C "$new/files" --wildcards './usr/*bin/*'
    done
    for program; do
        mv "$new"/files/usr/*bin/"$program" "$new/programs"
    done
    "$new/programs/dockerd" --version || skip "the dockerd of Debian $release does not run here: see above"
    mv "$new/programs" "$folder"
}

has apt-get || skip "the engine is Debian's, and there is no apt here"
mkdir -p "$engines"
exec 9>"$engines/lock"
flock 9
if [ ! -d "$folder" ]; then
    [ -e "$keys" ] || apt_install debian-archive-keyring
    new=$(mktemp -d "$engines/new.XXXXXX")
    trap 'rm -rf "$new"' EXIT
    fetch
    take_programs "$@"
fi
echo "$folder" >&3
