"""Trains a digit classifier, data-parallel: every rank has its own shard of the data, and gradients are averaged.

Uses torch.distributed (gloo) where torch can be imported, else plain python with an all-reduce over TCP. A rank finds
its place in RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT.
"""

import argparse
import csv
import gzip
import hashlib
import json
import math
import os
import random
import socket
import struct
import sys
import time

PIXELS, CLASSES = 64, 10
BATCH, RATE = 16, 0.5
CONNECT_SECONDS = 60


def load(path):
    """Pixels from 0 to 1 and the digit, for every image; every fifth is held out."""
    with gzip.open(path, "rt", newline="") as file:
        rows = [[float(x) for x in row] for row in csv.reader(file)]
    images = [([x / 16 for x in row[:PIXELS]], int(row[PIXELS])) for row in rows]
    return [image for i, image in enumerate(images) if i % 5], images[::5]


class PlainWorld:
    """All-reduce over TCP: rank 0 adds up what all ranks send, in their order, and sends the sum back."""

    name = "a plain-python all-reduce over TCP (torch cannot be imported)"

    def __init__(self, rank, size):
        self.rank, self.size, self.peers = rank, size, [None] * size
        address = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
        if rank == 0:
            server = socket.create_server(address)
            server.settimeout(CONNECT_SECONDS)
            for _ in range(size - 1):
                peer, _ = server.accept()
                peer.settimeout(CONNECT_SECONDS)
                self.peers[struct.unpack("!i", self._read(peer, 4))[0]] = peer
            server.close()
        else:
            self.peers[0] = self._connect(address)
            self.peers[0].sendall(struct.pack("!i", rank))

    @staticmethod
    def _connect(address):
        until = time.monotonic() + CONNECT_SECONDS
        while True:
            try:
                return socket.create_connection(address, timeout=CONNECT_SECONDS)
            except OSError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.05)

    @staticmethod
    def _read(peer, count):
        data = b""
        while len(data) < count:
            piece = peer.recv(count - len(data))
            if not piece:
                raise ConnectionError("a rank has gone away")
            data += piece
        return data

    def mean(self, values):
        form = "!%dd" % len(values)
        if self.rank == 0:
            total = list(values)
            for peer in self.peers[1:]:
                for i, x in enumerate(struct.unpack(form, self._read(peer, 8 * len(values)))):
                    total[i] += x
            total = [x / self.size for x in total]
            for peer in self.peers[1:]:
                peer.sendall(struct.pack(form, *total))
            return total
        self.peers[0].sendall(struct.pack(form, *values))
        return list(struct.unpack(form, self._read(self.peers[0], 8 * len(values))))


class PlainModel:
    """Softmax regression in plain python."""

    def __init__(self, world):
        self.world = world
        self.values = [0.0] * (CLASSES * (PIXELS + 1))

    def _scores(self, pixels):
        step = PIXELS + 1
        for c in range(CLASSES):
            row = self.values[c * step : (c + 1) * step]
            yield row[PIXELS] + sum(map(lambda w, x: w * x, row, pixels))

    def train(self, batch):
        gradient = [0.0] * len(self.values)
        for pixels, digit in batch:
            scores = list(self._scores(pixels))
            top = max(scores)
            weights = [math.exp(s - top) for s in scores]
            total = sum(weights)
            for c in range(CLASSES):
                error = weights[c] / total - (c == digit)
                base = c * (PIXELS + 1)
                for i, x in enumerate(pixels):
                    if x:
                        gradient[base + i] += error * x
                gradient[base + PIXELS] += error
        gradient = self.world.mean([g / len(batch) for g in gradient])
        self.values = [v - RATE * g for v, g in zip(self.values, gradient)]

    def predict(self, pixels):
        scores = list(self._scores(pixels))
        return scores.index(max(scores))

    def parameters(self):
        return self.values


class TorchModel:
    """The same in torch, with gradients averaged by DistributedDataParallel over gloo."""

    name = "torch.distributed with gloo"

    def __init__(self, torch):
        torch.distributed.init_process_group("gloo", init_method="env://")
        torch.manual_seed(0)
        self.torch, self.linear = torch, torch.nn.Linear(PIXELS, CLASSES)
        self.model = torch.nn.parallel.DistributedDataParallel(self.linear)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=RATE)

    def train(self, batch):
        pixels = self.torch.tensor([p for p, _ in batch])
        digits = self.torch.tensor([d for _, d in batch])
        self.optimizer.zero_grad()
        self.torch.nn.functional.cross_entropy(self.model(pixels), digits).backward()
        self.optimizer.step()

    def predict(self, pixels):
        with self.torch.no_grad():
            return int(self.linear(self.torch.tensor(pixels)).argmax())

    def parameters(self):
        return [float(x) for p in self.linear.parameters() for x in p.detach().flatten()]


def make_model(rank, size):
    try:
        import torch
        import torch.distributed

        usable = torch.distributed.is_available()
    except Exception:  # A broken installation fails in many ways.
        usable = False
    if usable:
        return TorchModel(torch), TorchModel.name
    return PlainModel(PlainWorld(rank, size)), PlainWorld.name


def digest(values):
    return hashlib.sha256(struct.pack("!%dd" % len(values), *values)).hexdigest()[:16]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--epochs", type=int, default=8)
    args = parser.parse_args()
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    train, held_out = load(args.data)
    shard = train[rank::size]
    # Ranks whose shards differ by one image still take the same number of steps.
    shard = shard[: len(train) // size]
    model, how = make_model(rank, size)
    print("world size %d, by %s" % (size, how))
    print("%d of %d training images, shard %s" % (len(shard), len(train), digest([x for p, _ in shard for x in p])))
    order = random.Random(rank)
    for epoch in range(1, args.epochs + 1):
        order.shuffle(shard)
        for i in range(0, len(shard), BATCH):
            model.train(shard[i : i + BATCH])
        if rank == 0:
            right = sum(model.predict(pixels) == digit for pixels, digit in held_out)
            print("epoch %d: held-out accuracy %.1f %%" % (epoch, 100 * right / len(held_out)))
    print("parameters %s" % digest(model.parameters()))
    if rank == 0:
        with open(os.path.join(args.model, "digits.json"), "w") as file:
            json.dump({"parameters": list(model.parameters())}, file)
    sys.stdout.flush()


main()
