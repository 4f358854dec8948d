"""Starts the ranks of a Horovod job over gloo: on this host as processes, on the job's others by the job's ssh.

Its arguments are how many ranks there are, and what bash runs in each. A rank's environment comes from its own host, so that only its place is on a
command line. Ranks are numbered over the hosts in their order, and meet at the server that Horovod has for that, here. It ends when all ranks have;
when one fails, with that one's code, and the node ends the others.
"""

import os
import subprocess
import sys

try:
    from horovod.common.util import gloo_built
    from horovod.runner.common.util.hosts import HostInfo, get_host_assignments
    from horovod.runner.http.http_server import RendezvousServer
except ImportError as error:
    sys.exit(
        "batchai: there is no mpirun on the PATH of this node, or the job wants none, and %s has no Horovod that starts ranks over gloo (%s): "
        "install Open MPI, MPICH or Intel MPI, or Horovod 0.20 or newer" % (sys.executable, error)
    )


# Horovod 0.28 forgets the interface that it was told for all of its groups but the first.
NAME = """
if command -v getent >/dev/null; then
    leads=$(getent ahosts "$(uname -n)")
    case $leads in
    "" | 127.* | ::1*)
        echo "batchai: rank $HOROVOD_RANK: the name of this node, $(uname -n), leads to '${leads%% *}'. Horovod's gloo has its ranks found" \
            "at what it leads to: let that be $HOROVOD_HOSTNAME, in the node's /etc/hosts" >&2
        ;;
    esac
fi
"""


def hosts():
    with open(os.environ["AZ_BATCHAI_MPI_HOST_FILE"]) as lines:
        for line in lines:
            address, slots = line.split()[:2]
            yield HostInfo(address, int(slots.split("=")[1]))


def started(slot, port, command):
    place = {
        "HOROVOD_CONTROLLER": "gloo",
        "HOROVOD_CPU_OPERATIONS": "gloo",
        "HOROVOD_GLOO_RENDEZVOUS_ADDR": os.environ["MASTER_ADDR"],
        "HOROVOD_GLOO_RENDEZVOUS_PORT": port,
        "HOROVOD_HOSTNAME": slot.hostname,
        "HOROVOD_RANK": slot.rank,
        "HOROVOD_SIZE": slot.size,
        "HOROVOD_LOCAL_RANK": slot.local_rank,
        "HOROVOD_LOCAL_SIZE": slot.local_size,
        "HOROVOD_CROSS_RANK": slot.cross_rank,
        "HOROVOD_CROSS_SIZE": slot.cross_size,
    }
    words = " ".join("%s=%s" % pair for pair in place.items())
    line = "export %s\n%s%s" % (words, NAME if slot.cross_size > 1 else "", command)
    here = slot.hostname == os.environ["MASTER_ADDR"]
    start = ["/bin/bash", "-c", line] if here else ["ssh", slot.hostname, line]
    return subprocess.Popen(start, stdin=subprocess.DEVNULL)


def main(count, command):
    if gloo_built() is False:
        sys.exit("batchai: Horovod was built without gloo here, and its ranks cannot be started by mpirun: build it with HOROVOD_WITH_GLOO=1")
    slots = get_host_assignments(list(hosts()), count, count)
    server = RendezvousServer()
    port = server.start()
    server.init(slots)
    ranks = {}
    for slot in slots:
        ranks[started(slot, port, command).pid] = slot
    while ranks:
        pid, status = os.wait()
        slot = ranks.pop(pid, None)
        if slot is None or status == 0:
            continue
        code = os.WEXITSTATUS(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status)
        sys.stderr.write("batchai: rank %d on %s ended with %d, and so ends the job\n" % (slot.rank, slot.hostname, code))
        sys.stderr.flush()
        os._exit(code)
    # The server's thread would go on.
    os._exit(0)


main(int(sys.argv[1]), sys.argv[2])
