"""Fits a line through noisy points by CNTK, data-parallel: every rank has points of its own, and CNTK adds up the gradients over MPI."""

import hashlib
import socket
import sys

import cntk
import numpy
from cntk.train.distributed import Communicator, data_parallel_distributed_learner

FEATURES, BATCH, STEPS = 8, 64, 60


def say(line):
    """In one piece: what other ranks print may come between two."""
    sys.stdout.write(line + "\n")


def digest(arrays):
    total = hashlib.sha256()
    for array in arrays:
        total.update(numpy.ascontiguousarray(array).tobytes())
    return total.hexdigest()[:16]


def main():
    rank, size = Communicator.rank(), Communicator.num_workers()
    draw = numpy.random.RandomState(rank)
    truth = numpy.arange(1, FEATURES + 1, dtype=numpy.float32)
    points = draw.normal(size=(BATCH, FEATURES)).astype(numpy.float32)
    values = (points @ truth)[:, None] + 0.01 * draw.normal(size=(BATCH, 1)).astype(numpy.float32)
    say("rank %d of %d on %s, shard %s" % (rank, size, socket.gethostname(), digest([points])))
    x, y = cntk.input_variable(FEATURES), cntk.input_variable(1)
    line = cntk.layers.Dense(1, init=0)(x)
    rate = cntk.learning_parameter_schedule(0.05, minibatch_size=cntk.learners.IGNORE)
    learner = data_parallel_distributed_learner(cntk.sgd(line.parameters, rate, minibatch_size=cntk.learners.IGNORE))
    trainer = cntk.Trainer(line, (cntk.squared_error(line, y), None), [learner])
    for step in range(STEPS):
        trainer.train_minibatch({x: points, y: values.astype(numpy.float32)})
        if rank == 0 and step % 20 == 0:
            say("step %d: loss %.4f" % (step, trainer.previous_minibatch_loss_average))
    say("rank %d: parameters %s" % (rank, digest(p.value for p in line.parameters)))
    Communicator.finalize()


main()
