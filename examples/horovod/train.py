"""Logistic regression by Horovod with PyTorch: every rank has its own shard of the data, and gradients are averaged."""

import hashlib
import os
import socket
import sys

import horovod.torch as hvd
import torch

SAMPLES, FEATURES, STEPS, RATE = 1024, 16, 61, 1.0


def digest(tensor):
    values = "".join(float(x).hex() for x in tensor.detach().flatten())
    return hashlib.sha256(values.encode()).hexdigest()[:16]


def say(line):
    """In one piece: what other ranks print may come between two."""
    sys.stdout.write(line + "\n")


hvd.init()
rank, size = hvd.rank(), hvd.size()
over = "MPI" if hvd.mpi_enabled() else "gloo"
generator = torch.Generator().manual_seed(1)
samples = torch.randn(SAMPLES, FEATURES, generator=generator)
labels = (samples @ torch.randn(FEATURES, generator=generator) > 0).float()
samples, labels = samples[rank::size], labels[rank::size]
say("rank %d of %d on %s, shard %s" % (rank, size, socket.gethostname(), digest(samples)))
say("rank %d is %d of %d there, over %s" % (rank, hvd.local_rank(), hvd.local_size(), over))

# Ranks begin with different parameters: what they are equal by in the end, they had from rank 0.
torch.manual_seed(rank)
model = torch.nn.Linear(FEATURES, 1)
hvd.broadcast_parameters(model.state_dict(), root_rank=0)
optimizer = hvd.DistributedOptimizer(
    torch.optim.SGD(model.parameters(), lr=RATE), named_parameters=model.named_parameters()
)
for step in range(STEPS):
    optimizer.zero_grad()
    loss = torch.nn.functional.binary_cross_entropy_with_logits(model(samples).flatten(), labels)
    loss.backward()
    optimizer.step()
    mean = hvd.allreduce(loss.detach(), name="loss").item()
    if rank == 0 and step % 20 == 0:
        say("step %d: loss %.4f" % (step, mean))
say("rank %d: parameters %s" % (rank, digest(torch.cat([p.flatten() for p in model.parameters()]))))
if rank == 0:
    torch.save(model.state_dict(), os.path.join(os.environ["AZ_BATCHAI_OUTPUT_MODEL"], "line.pt"))
hvd.shutdown()
