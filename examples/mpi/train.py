"""Fits a line through noisy points, data-parallel over MPI: every rank has its own shard, and gradients are averaged.

Needs mpi4py and numpy. A rank has its number from MPI itself.
"""

import hashlib
import os
import socket
import sys

import numpy
from mpi4py import MPI

POINTS, FEATURES, STEPS, RATE = 1000, 8, 40, 0.2


def digest(values):
    return hashlib.sha256(numpy.ascontiguousarray(values).tobytes()).hexdigest()[:16]


def say(line):
    """In one piece: what other ranks print may come between two."""
    sys.stdout.write(line + "\n")


def main():
    world = MPI.COMM_WORLD
    rank, size = world.Get_rank(), world.Get_size()
    truth = numpy.arange(1.0, FEATURES + 1)
    draw = numpy.random.RandomState(rank)
    inputs = draw.normal(size=(POINTS, FEATURES))
    outputs = inputs @ truth + 0.01 * draw.normal(size=POINTS)
    say("rank %d of %d on %s, shard %s" % (rank, size, socket.gethostname(), digest(inputs)))
    weights = numpy.zeros(FEATURES)
    for step in range(STEPS):
        errors = inputs @ weights - outputs
        loss = world.allreduce(float(errors @ errors)) / (POINTS * size)
        gradient = numpy.empty(FEATURES)
        world.Allreduce(inputs.T @ errors / (POINTS * size), gradient)
        weights -= RATE * gradient
        if rank == 0 and step % 10 == 0:
            say("step %d: loss %.4f" % (step, loss))
    say("rank %d: parameters %s" % (rank, digest(weights)))
    if rank == 0:
        numpy.savetxt(os.path.join(os.environ["AZ_BATCHAI_OUTPUT_MODEL"], "weights.txt"), weights)


main()
