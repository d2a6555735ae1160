"""systemd as process 1 of a lab's host, with no units but those it is given.

The machine's own units are not looked at: they would set up hardware and clocks, which are the machine's. With the
cgroup namespace systemd takes a cgroup of the lab for the root, as in a container.
"""

from collections.abc import Mapping

from lab.host import Host
from lab.process import wait_until

PROGRAM = "/lib/systemd/systemd"
UNITS = "/run/lab-units"
# Version 2 of cgroups is one hierarchy; of version 1 there are several, some with a second name that is a link.
_INIT = """
set -e
points=/sys/fs/cgroup
if [ ! -e $points/cgroup.procs ]; then
    points=
    for point in /sys/fs/cgroup/*; do
        [ -L "$point" ] || [ ! -e "$point/cgroup.procs" ] || points="$points $point"
    done
fi
for point in $points; do
    mkdir -p "$point/{group}"
    for setting in cpuset.cpus cpuset.mems; do  # a new cgroup of version 1 has none, and takes no process then
        path=
        for folder in {folders}; do
            [ ! -e "$point/$setting" ] || cat "$point/$path$setting" > "$point/$path$folder/$setting"
            path=$path$folder/
        done
    done
    echo $$ > "$point/{group}/cgroup.procs"
done
export points
exec unshare --cgroup sh -ec '
    for point in $points; do
        mount -n --bind "$point/{group}" "$point"
    done
    mount -n --make-rshared /
    exec env -i PATH="$PATH" container=lab SYSTEMD_UNIT_PATH={units} SYSTEMD_GENERATOR_PATH=/run/none \\
        SYSTEMD_ENVIRONMENT_GENERATOR_PATH=/run/none {program} --log-target=null --unit=lab.target
'
"""
_EMPTY = ("sysinit", "basic", "shutdown", "network-online")


def boot(host: Host, units: Mapping[str, str], wants: str) -> None:
    """Let systemd start. It is what runs the host's services from then on.

    :param units: texts by file name, below the units' folder.
    :param wants: names of the units to start.
    """
    group = f"{host.cgroup}-systemd"
    target = f"[Unit]\nDefaultDependencies=no\nWants={wants}\n"
    empty = {f"{name}.target": "[Unit]\nDefaultDependencies=no\n" for name in _EMPTY}
    for name, text in {**empty, "lab.target": target, **units}.items():
        host.write(f"{UNITS[1:]}/{name}", text)
    host.write("run/lab-init", _INIT.format(group=group, folders=group.replace("/", " "), units=UNITS, program=PROGRAM))
    host.run("sh", "-c", "kill -USR1 1")
    up = ("initializing", "starting", "running", "degraded")
    wait_until(lambda: host.run("systemctl", "is-system-running", check=False) in up, "systemd", timeout=30)
