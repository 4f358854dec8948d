"""Logistic regression with TensorFlow 2 and MultiWorkerMirroredStrategy, which finds the other workers in TF_CONFIG.

Every worker has its own shard of the data, and gradients are averaged.
"""

import hashlib

import tensorflow as tf

SAMPLES, FEATURES, EPOCHS, RATE = 1024, 16, 20, 1.0


def digest(tensor):
    values = "".join(float(x).hex() for x in tensor.numpy().flatten())
    return hashlib.sha256(values.encode()).hexdigest()[:16]


strategy = tf.distribute.MultiWorkerMirroredStrategy()
index, size = strategy.cluster_resolver.task_id, strategy.num_replicas_in_sync

samples = tf.random.stateless_normal([SAMPLES, FEATURES], seed=[1, 1])
truth = tf.random.stateless_normal([FEATURES], seed=[2, 2])
labels = tf.cast(tf.linalg.matvec(samples, truth) > 0, tf.float32)
samples, labels = samples[index::size], labels[index::size]
print("worker %d of %d: %d of %d samples, shard %s" % (index, size, len(samples), SAMPLES, digest(samples)))

with strategy.scope():
    weights = tf.Variable(tf.zeros([FEATURES]))


@tf.function
def averaged(samples, labels):
    """The mean of all workers' gradients, and this one's loss."""

    def own(samples, labels):
        with tf.GradientTape() as tape:
            scores = tf.linalg.matvec(samples, weights)
            loss = tf.reduce_mean(tf.nn.sigmoid_cross_entropy_with_logits(labels, scores))
        gradient = tape.gradient(loss, weights)
        context = tf.distribute.get_replica_context()
        return context.all_reduce(tf.distribute.ReduceOp.MEAN, gradient), loss

    return strategy.run(own, args=(samples, labels))


for epoch in range(1, EPOCHS + 1):
    gradient, loss = averaged(samples, labels)
    with strategy.scope():
        weights.assign_sub(RATE * gradient)
    print("epoch %d: loss %.4f" % (epoch, loss))
print("parameters %s" % digest(weights.read_value()))
