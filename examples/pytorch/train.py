"""Logistic regression by DistributedDataParallel: every rank has its own shard of the data, and gradients are averaged.

Ranks meet as the original's recipes had it: by the arguments of the job, and not by the environment.
"""

import argparse
import hashlib
import os

import torch
import torch.distributed as dist

SAMPLES, FEATURES, EPOCHS, RATE = 1024, 16, 20, 1.0


def digest(tensor):
    values = "".join(float(x).hex() for x in tensor.detach().flatten())
    return hashlib.sha256(values.encode()).hexdigest()[:16]


parser = argparse.ArgumentParser()
parser.add_argument("--rank", type=int, required=True)
parser.add_argument("--dist-url", required=True)
parser.add_argument("--backend", required=True)
args = parser.parse_args()
dist.init_process_group(
    args.backend, init_method=args.dist_url, rank=args.rank, world_size=int(os.environ["WORLD_SIZE"])
)
rank, size = dist.get_rank(), dist.get_world_size()

generator = torch.Generator().manual_seed(1)
samples = torch.randn(SAMPLES, FEATURES, generator=generator)
labels = (samples @ torch.randn(FEATURES, generator=generator) > 0).float()
samples, labels = samples[rank::size], labels[rank::size]
print("rank %d of %d by %s: %d of %d samples, shard %s" % (rank, size, args.backend, len(samples), SAMPLES, digest(samples)))

# Ranks begin with different parameters: what they are equal by in the end, they had from each other.
torch.manual_seed(rank)
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(FEATURES, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
for epoch in range(1, EPOCHS + 1):
    optimizer.zero_grad()
    loss = torch.nn.functional.binary_cross_entropy_with_logits(model(samples).flatten(), labels)
    loss.backward()
    optimizer.step()
    print("epoch %d: loss %.4f" % (epoch, loss.item()))
print("parameters %s" % digest(torch.cat([p.flatten() for p in model.parameters()])))
