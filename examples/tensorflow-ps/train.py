"""Logistic regression with TensorFlow 1 and a parameter server, whose weights all workers read and change, each by its own shard of the data."""

import argparse
import hashlib
import time

import numpy as np
import tensorflow as tf

SAMPLES, FEATURES, STEPS, RATE = 1024, 16, 60, 0.5


def digest(array):
    return hashlib.sha256(array.astype(np.float32).tobytes()).hexdigest()[:16]


parser = argparse.ArgumentParser()
parser.add_argument("--job_name", required=True)
parser.add_argument("--task_index", type=int, required=True)
parser.add_argument("--ps_hosts", required=True)
parser.add_argument("--worker_hosts", required=True)
args = parser.parse_args()
servers, workers = args.ps_hosts.split(","), args.worker_hosts.split(",")
index, size = args.task_index, len(workers)
cluster = tf.train.ClusterSpec({"ps": servers, "worker": workers})
server = tf.train.Server(cluster, job_name=args.job_name, task_index=index)
if args.job_name == "ps":
    print("parameter server %d of %d serves %d workers" % (index, len(servers), size), flush=True)
    server.join()  # Never returns.

random = np.random.RandomState(1)
samples = random.randn(SAMPLES, FEATURES).astype(np.float32)
labels = (samples.dot(random.randn(FEATURES)) > 0).astype(np.float32)
samples, labels = samples[index::size], labels[index::size]
print("worker %d of %d: %d of %d samples, shard %s" % (index, size, len(samples), SAMPLES, digest(samples)))

with tf.device(tf.train.replica_device_setter(worker_device="/job:worker/task:%d" % index, cluster=cluster)):
    step = tf.train.get_or_create_global_step()
    weights = tf.get_variable("weights", [FEATURES], initializer=tf.zeros_initializer())
    here = tf.get_variable("here", [], tf.int32, tf.zeros_initializer(), trainable=False)
    done = tf.get_variable("done", [], tf.int32, tf.zeros_initializer(), trainable=False)
    scores = tf.linalg.matvec(tf.constant(samples), weights)
    loss = tf.reduce_mean(tf.nn.sigmoid_cross_entropy_with_logits(labels=tf.constant(labels), logits=scores))
    train = tf.train.GradientDescentOptimizer(RATE).minimize(loss, global_step=step)
    arrive, finish = here.assign_add(1, use_locking=True), done.assign_add(1, use_locking=True)
print("the weights are on %s" % weights.device)


def wait_for_all(session, counter):
    while session.run(counter) < size:
        time.sleep(0.05)


with tf.train.MonitoredTrainingSession(master=server.target, is_chief=index == 0) as session:
    session.run(arrive)
    wait_for_all(session, here)
    for own in range(1, STEPS + 1):
        value, _ = session.run([loss, train])
        if own % 10 == 1 or own == STEPS:
            print("step %d: loss %.4f" % (own, value))
    session.run(finish)
    wait_for_all(session, done)
    print("%d steps by all, parameters %s" % (session.run(step), digest(session.run(weights))))
