#!/bin/sh
# Runs in the image's build: copies what weft needs to run into the folder $1, and nothing else.
set -eu
root=$1
venv=/opt/weft
python=$(readlink -f "$venv/bin/python3")
stdlib=$("$venv/bin/python3" -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')
nft=$(command -v nft)

mkdir -p "$root/etc" "$root/usr/bin" "$root/usr/lib" "$root/usr/sbin" "$root/var" "$root/run"
mkdir -m 1777 "$root/tmp"
for folder in bin sbin lib lib64; do # where /usr is merged
    [ ! -L /$folder ] || { mkdir -p "$root/usr/$folder"; ln -s "usr/$folder" "$root/$folder"; }
done
ln -s /run "$root/var/run"
echo 'root:x:0:0:root:/root:/usr/sbin/nologin' >"$root/etc/passwd"
echo 'root:x:0:' >"$root/etc/group"
echo 'hosts: files dns' >"$root/etc/nsswitch.conf"

# Of the standard library not the tests, the installers and the graphics.
tar -C / -ch --hard-dereference --exclude=__pycache__ --exclude='config-*' --exclude=test --exclude=tests \
    --exclude=idlelib --exclude=ensurepip --exclude=lib2to3 --exclude=tkinter --exclude=turtledemo \
    --exclude=pydoc_data --exclude=site-packages "${stdlib#/}" | tar -C "$root" -x
tar -C / -c --exclude=__pycache__ "${venv#/}" | tar -C "$root" -x
cp -L --parents "$python" "$nft" "$root"
ln -sf "${python##*/}" "$root${python%/*}/python3" # as the venv's link has it
find "$python" "$nft" "$stdlib/lib-dynload" "$venv" -type f \( -perm -1 -o -name '*.so' \) -exec ldd {} + 2>/dev/null |
    sed -n 's/^\t[^/]*\(\/[^ ]*\) (0x.*/\1/p' | sort -u | while read -r library; do cp -L --parents "$library" "$root"; done
cp -r --parents /etc/ld.so.conf /etc/ld.so.conf.d "$root"
ldconfig -r "$root"
rm -f "$root/var/cache/ldconfig/aux-cache"

# Compiled here, and told never to look at the source's time: a start is quicker, and the files are the same each time.
"$python" -m compileall -q --invalidation-mode unchecked-hash -s "$root" "$root$stdlib" "$root$venv"

# Nothing is missing.
chroot "$root" "$nft" --version
PYTHONDONTWRITEBYTECODE=1 chroot "$root" "$venv/bin/weft" --version
