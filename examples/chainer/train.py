"""Trains a small network to tell two spirals apart, data-parallel with ChainerMN: every rank has its own part of the points.

Needs chainer 7 with mpi4py. Ranks find each other by MPI.
"""

import argparse
import hashlib
import os
import socket
import sys

import chainer
import chainer.functions as F
import chainer.links as L
import chainermn
import numpy

POINTS, BATCH, EPOCHS = 1024, 32, 20


def say(line):
    """In one piece: what other ranks print may come between two."""
    sys.stdout.write(line + "\n")


def digest(arrays):
    total = hashlib.sha256()
    for array in arrays:
        total.update(numpy.ascontiguousarray(array).tobytes())
    return total.hexdigest()[:16]


def spirals():
    draw = numpy.random.RandomState(7)
    label = numpy.arange(POINTS) % 2
    turn = draw.uniform(0.5, 3.0, POINTS)
    angle = turn * 2.5 + numpy.pi * label
    points = numpy.stack([turn * numpy.cos(angle), turn * numpy.sin(angle)], axis=1)
    points += draw.normal(scale=0.05, size=points.shape)
    return chainer.datasets.TupleDataset(points.astype(numpy.float32), label.astype(numpy.int32))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("-o", "--out", required=True)
    args = parser.parse_args()
    world = chainermn.create_communicator("naive")
    rank, size = world.rank, world.size
    shard = chainermn.scatter_dataset(spirals() if rank == 0 else None, world, shuffle=True, seed=1)
    points = numpy.stack([point for point, _ in shard])
    say("rank %d of %d on %s, shard %s" % (rank, size, socket.gethostname(), digest([points])))
    numpy.random.seed(rank)
    model = L.Classifier(chainer.Sequential(L.Linear(2, 32), F.tanh, L.Linear(32, 32), F.tanh, L.Linear(32, 2)))
    optimizer = chainermn.create_multi_node_optimizer(chainer.optimizers.Adam(0.01), world)
    optimizer.setup(model)
    for epoch in range(EPOCHS):
        losses = []
        for batch in chainer.iterators.SerialIterator(shard, BATCH, repeat=False):
            x, t = chainer.dataset.concat_examples(batch)
            optimizer.update(model, x, t)
            losses.append(float(model.loss.array))
        loss = world.allreduce_obj(numpy.mean(losses)) / size
        if rank == 0 and epoch % 4 == 3:
            say("epoch %d: loss %.4f" % (epoch, loss))
    say("rank %d: parameters %s" % (rank, digest(p.array for _, p in sorted(model.namedparams()))))
    if rank == 0:
        chainer.serializers.save_npz(os.path.join(args.out, "spirals.npz"), model)


main()
