"""Logistic regression with Caffe2: every node has its own shard of the data, and gloo averages the gradients.

Nodes find each other in files below a directory that they share, as the original's recipes had it.
"""

import argparse
import hashlib
import os

import numpy as np
from caffe2.python import core, workspace

SAMPLES, FEATURES, EPOCHS, RATE = 1024, 16, 20, 1.0


def digest(array):
    return hashlib.sha256(np.ascontiguousarray(array, np.float32).tobytes()).hexdigest()[:16]


parser = argparse.ArgumentParser()
parser.add_argument("--num_shards", type=int, required=True)
parser.add_argument("--shard_id", type=int, required=True)
parser.add_argument("--file_store_path", required=True)
args = parser.parse_args()
shard, size = args.shard_id, args.num_shards

random = np.random.RandomState(1)
samples = random.randn(SAMPLES, FEATURES).astype(np.float32)
labels = (samples.dot(random.randn(FEATURES)) > 0).astype(np.int32)
samples, labels = samples[shard::size], labels[shard::size]
print("node %d of %d: %d of %d samples, shard %s" % (shard, size, len(samples), SAMPLES, digest(samples)))

workspace.RunOperatorOnce(core.CreateOperator("FileStoreHandlerCreate", [], ["store"], path=args.file_store_path))
workspace.RunOperatorOnce(
    core.CreateOperator(
        "CreateCommonWorld",
        ["store"],
        ["world"],
        name="all",
        size=size,
        rank=shard,
        engine="GLOO",
        interface=os.environ.get("GLOO_SOCKET_IFNAME", ""),
    )
)
workspace.FeedBlob("samples", samples)
workspace.FeedBlob("labels", labels.reshape(-1, 1))
workspace.FeedBlob("weights", np.zeros([2, FEATURES], np.float32))
workspace.FeedBlob("bias", np.zeros([2], np.float32))
workspace.FeedBlob("rate", np.array([-RATE / size], np.float32))
workspace.FeedBlob("one", np.array([1], np.float32))

net = core.Net("step")
scores = net.FC(["samples", "weights", "bias"], "scores")
_, loss = net.SoftmaxWithLoss([scores, "labels"], ["probabilities", "loss"])
gradients = net.AddGradientOperators([loss])
for parameter in ["weights", "bias"]:
    gradient = gradients[parameter]
    net.Allreduce(["world", gradient], [gradient], engine="GLOO")
    net.WeightedSum([parameter, "one", gradient, "rate"], parameter)
workspace.CreateNet(net)
for epoch in range(1, EPOCHS + 1):
    workspace.RunNet(net)
    print("epoch %d: loss %.4f" % (epoch, workspace.FetchBlob("loss")))
print("parameters %s" % digest(np.append(workspace.FetchBlob("weights"), workspace.FetchBlob("bias"))))
