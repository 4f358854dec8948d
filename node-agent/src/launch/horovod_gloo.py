"""Starts the ranks of a Horovod job over gloo: on this host as processes, on the job's others by the job's ssh.

Its arguments are how many ranks there are, what a shell runs in each, and the port of this host that the job was given. A rank's environment comes
from its own host, so that only its place is on a command line. Ranks are numbered over the hosts in their order, and meet at the server that
Horovod has for that, here, which answers the job's hosts only. It ends when all ranks have; when one fails, with that one's code, and the node ends
the others.
"""

import sys

# What lies in the job's directory is nothing of this program's.
sys.path = [path for path in sys.path if path]

import errno
import os
import shutil
import socketserver
import subprocess
import threading


def say(what):
    sys.stderr.write("batchai: %s\n" % what)
    sys.stderr.flush()


def end(code, why):
    say(why)
    # Others than this thread would go on.
    os._exit(code)


try:
    from horovod.common.util import gloo_built
    from horovod.runner.common.util.hosts import HostInfo, get_host_assignments
    from horovod.runner.http.http_server import RendezvousHandler, RendezvousHTTPServer
except ImportError as error:
    end(
        1,
        "%s has no Horovod that starts ranks over gloo (%s): install Open MPI, MPICH or Intel MPI, or Horovod 0.20 or newer"
        % (sys.executable, error),
    )

# What a rank tells the others are addresses of its own, less than 200 bytes for each of them.
VALUE_MAX = 16 << 20

# A rank's place is read from MPI's variables first: none of them may be left over from elsewhere.
RANK = """unset OMPI_COMM_WORLD_RANK OMPI_COMM_WORLD_SIZE OMPI_COMM_WORLD_LOCAL_RANK OMPI_COMM_WORLD_LOCAL_SIZE
unset PMI_RANK PMI_SIZE MPI_LOCALRANKID MPI_LOCALNRANKS
export HOROVOD_GLOO_TIMEOUT_SECONDS="${HOROVOD_GLOO_TIMEOUT_SECONDS:-600}" """

# Horovod 0.28 forgets the interface that it was told for all of its groups but the first.
NAME = """if command -v getent >/dev/null; then
    set -- $(getent ahosts "$(uname -n)")
    if [ "$1" != "$HOROVOD_HOSTNAME" ]; then
        echo "batchai: rank $HOROVOD_RANK: the name of this node, $(uname -n), leads to '$1'. Horovod's gloo has its ranks found" \
            "at what it leads to: let that be $HOROVOD_HOSTNAME, in the node's /etc/hosts" >&2
    fi
fi
"""


class Handler(RendezvousHandler):
    def do_PUT(self):
        length = self.headers.get("Content-Length", "")
        if length.isdecimal() and int(length) <= VALUE_MAX:
            RendezvousHandler.do_PUT(self)
        else:
            self.send_error(413)

    def do_HEAD(self):
        # Python's own would tell of files.
        self.send_error(501)


class Server(RendezvousHTTPServer):
    daemon_threads = True

    def __init__(self, address, port, peers):
        self.peers, self.told = peers, False
        RendezvousHTTPServer.__init__(self, (address, port), Handler, 0)

    def server_bind(self):
        # HTTPServer asks for the address's name as well, and may wait long for it.
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]

    def verify_request(self, request, client_address):
        known = client_address[0] in self.peers
        if not known and not self.told:
            self.told = True
            say("%s, which is no address of the job's nodes, is not let to where its ranks meet" % client_address[0])
        return known


def server(address, port, peers):
    try:
        return Server(address, port, peers)
    except OSError as error:
        if port and error.errno == errno.EADDRINUSE:
            say("port %d of %s is in use: the ranks meet at a free one" % (port, address))
            return server(address, 0, peers)
        end(1, "the ranks cannot meet at port %d of %s, the address of this node: %s" % (port, address, error))


def hosts():
    with open(os.environ["AZ_BATCHAI_MPI_HOST_FILE"]) as lines:
        for line in lines:
            address, slots = line.split()[:2]
            yield HostInfo(address, int(slots.split("=")[1]))


def started(slot, meeting, command):
    master, port = meeting
    place = {
        "HOROVOD_CONTROLLER": "gloo",
        "HOROVOD_CPU_OPERATIONS": "gloo",
        "HOROVOD_GLOO_RENDEZVOUS_ADDR": master,
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
    first_of_several = slot.local_rank == 0 and slot.cross_size > 1
    line = "%s%s\n%s%s" % (RANK, words, NAME if first_of_several else "", command)
    if slot.hostname == master:
        shell = "/bin/bash" if os.path.exists("/bin/bash") else "/bin/sh"
        start = [shell, "-c", line]
    else:
        start = ["ssh", slot.hostname, line]
    return subprocess.Popen(start, stdin=subprocess.DEVNULL)


def main(count, command, port):
    if gloo_built() is False:
        end(1, "Horovod was built without gloo here, and its ranks are not to be started by mpirun: build it with HOROVOD_WITH_GLOO=1")
    all_hosts = list(hosts())
    peers = [host.hostname for host in all_hosts]
    for peer in peers:
        if ":" in peer:
            end(1, "Horovod's ranks cannot meet over IPv6, and %s is a node: register nodes by IPv4 (--address), or install mpirun" % peer)
    if len(peers) > 1 and not shutil.which("ssh"):
        end(127, "there is no ssh on the PATH of this node (%s), by which the ranks of the other nodes are started" % os.environ.get("PATH"))
    slots = get_host_assignments(all_hosts, count, count)
    meeting = server(peers[0], port, peers)
    meeting.init(slots)
    threading.Thread(target=meeting.serve_forever, daemon=True).start()
    ranks = {}
    for slot in slots:
        rank = started(slot, meeting.server_address, command)
        # It is kept: subprocess waits for those that nobody holds any more.
        ranks[rank.pid] = rank, slot
    while ranks:
        pid, status = os.wait()
        _, slot = ranks.pop(pid, (None, None))
        if slot is None or status == 0:
            continue
        code = os.WEXITSTATUS(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status)
        end(code, "rank %d on %s ended with %d, and so ends the job" % (slot.rank, slot.hostname, code))
    os._exit(0)


main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
