"""Logistic regression with PyTorch, data-parallel over MPI: every rank has its own shard of the data, and gradients are averaged.

By torch.distributed where torch was built with MPI, which no package of it is; else by mpi4py, with the same MPI.
"""

import argparse
import hashlib
import os
import socket
import sys

import torch
import torch.distributed as dist
from mpi4py import MPI

SAMPLES, FEATURES, STEPS, RATE = 1024, 16, 61, 1.0


def digest(tensor):
    values = "".join(float(x).hex() for x in tensor.detach().flatten())
    return hashlib.sha256(values.encode()).hexdigest()[:16]


def say(line):
    """In one piece: what other ranks print may come between two."""
    sys.stdout.write(line + "\n")


parser = argparse.ArgumentParser()
parser.add_argument("--backend", required=True)
args = parser.parse_args()
by_torch = dist.is_mpi_available()
if by_torch:
    dist.init_process_group(args.backend)


def add_up(tensor):
    if by_torch:
        dist.all_reduce(tensor)
    else:
        MPI.COMM_WORLD.Allreduce(MPI.IN_PLACE, tensor.numpy())
    return tensor


world = MPI.COMM_WORLD
rank, size = world.Get_rank(), world.Get_size()
generator = torch.Generator().manual_seed(1)
samples = torch.randn(SAMPLES, FEATURES, generator=generator)
labels = (samples @ torch.randn(FEATURES, generator=generator) > 0).float()
samples, labels = samples[rank::size], labels[rank::size]
say("rank %d of %d on %s, shard %s" % (rank, size, socket.gethostname(), digest(samples)))
say("rank %d goes by %s, index %s" % (rank, "torch.distributed" if by_torch else "mpi4py", os.environ["AZ_BATCHAI_TASK_INDEX"]))

torch.manual_seed(0)
model = torch.nn.Linear(FEATURES, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
for step in range(STEPS):
    optimizer.zero_grad()
    loss = torch.nn.functional.binary_cross_entropy_with_logits(model(samples).flatten(), labels)
    loss.backward()
    for parameter in model.parameters():
        add_up(parameter.grad).div_(size)
    optimizer.step()
    mean = add_up(loss.detach().clone().reshape(1)).item() / size
    if rank == 0 and step % 20 == 0:
        say("step %d: loss %.4f" % (step, mean))
say("rank %d: parameters %s" % (rank, digest(torch.cat([p.flatten() for p in model.parameters()]))))
