"""Logistic regression by DistributedDataParallel, as one writes it for torchrun: ranks have their place from the environment."""

import hashlib
import os
import socket

import torch
import torch.distributed as dist

SAMPLES, FEATURES, EPOCHS, RATE = 1024, 16, 20, 1.0


def digest(tensor):
    values = "".join(float(x).hex() for x in tensor.detach().flatten())
    return hashlib.sha256(values.encode()).hexdigest()[:16]


def say(line):
    """In one piece: what other ranks print may come between two."""
    os.write(1, (line + "\n").encode())


# Of GPUs each rank takes torch.device("cuda", int(os.environ["LOCAL_RANK"])), and the backend is "nccl".
dist.init_process_group("gloo")
rank, size = dist.get_rank(), dist.get_world_size()
generator = torch.Generator().manual_seed(1)
samples = torch.randn(SAMPLES, FEATURES, generator=generator)
labels = (samples @ torch.randn(FEATURES, generator=generator) > 0).float()
samples, labels = samples[rank::size], labels[rank::size]
say("rank %d of %d on %s, shard %s" % (rank, size, socket.gethostname(), digest(samples)))
say("rank %d is %s of %s there, torch %s" % (rank, os.environ["LOCAL_RANK"], os.environ["LOCAL_WORLD_SIZE"], torch.__version__))

# Ranks begin with different parameters: what they are equal by in the end, they had from each other.
torch.manual_seed(rank)
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(FEATURES, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
for epoch in range(1, EPOCHS + 1):
    optimizer.zero_grad()
    loss = torch.nn.functional.binary_cross_entropy_with_logits(model(samples).flatten(), labels)
    loss.backward()
    optimizer.step()
    mean = loss.detach().clone()
    dist.all_reduce(mean)
    if rank == 0:
        say("epoch %d: loss %.4f" % (epoch, mean.item() / size))
say("rank %d: parameters %s" % (rank, digest(torch.cat([p.flatten() for p in model.parameters()]))))
dist.destroy_process_group()
