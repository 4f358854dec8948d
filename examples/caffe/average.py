"""Trains by Caffe on several nodes: every rank steps by itself on points of its own, and then takes the mean of all weights.

Needs pycaffe and mpi4py.
"""

import hashlib
import socket
import sys

import caffe
import numpy
from mpi4py import MPI

STEPS = 60


def say(line):
    """In one piece: what other ranks print may come between two."""
    sys.stdout.write(line + "\n")


def digest(arrays):
    total = hashlib.sha256()
    for array in arrays:
        total.update(numpy.ascontiguousarray(array).tobytes())
    return total.hexdigest()[:16]


def main():
    world = MPI.COMM_WORLD
    rank, size = world.Get_rank(), world.Get_size()
    # The same solver, with a seed of the rank's own.
    own = "solver-%d.prototxt" % rank
    with open("solver.prototxt") as given, open(own, "w") as file:
        file.write(given.read().replace("random_seed: 1", "random_seed: %d" % (rank + 1)))
    solver = caffe.get_solver(own)
    student = solver.net.params["student"]
    for step in range(STEPS):
        solver.step(1)
        if step == 0:
            points = solver.net.blobs["data"].data
            say("rank %d of %d on %s, shard %s" % (rank, size, socket.gethostname(), digest([points])))
        for blob in student:
            mean = numpy.empty_like(blob.data)
            world.Allreduce(blob.data, mean)
            blob.data[...] = mean / size
        loss = world.allreduce(float(solver.net.blobs["loss"].data)) / size
        if rank == 0 and step % 20 == 0:
            say("step %d: loss %.4f" % (step, loss))
    say("rank %d: parameters %s" % (rank, digest(blob.data for blob in student)))


main()
