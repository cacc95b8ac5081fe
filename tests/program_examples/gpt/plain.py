"""A GPT over the characters of a text (Radford et al. 2018), whose embeddings do not decay."""

import autograd.numpy as np
from autograd import value_and_grad

CONTEXT = 16
WIDTH = 16
HEADS = 2
BATCH_SIZE = 16
STEPS = 40
LEARNING_RATE = 0.01
WEIGHT_DECAY = {"embedding": 0.0, "block0": 0.1, "block1": 0.1, "head": 0.1}

windows = np.load("text.npz")["x"]  # (rows, CONTEXT + 1) character codes
rng = np.random.default_rng(0)
mask = np.triu(np.full((CONTEXT, CONTEXT), -1e9), k=1)


def weight(n_in, n_out):
    return rng.normal(0, n_in**-0.5, (n_in, n_out))


def block():
    return {
        "project": weight(WIDTH, 3 * WIDTH),
        "output": weight(WIDTH, WIDTH),
        "expand": weight(WIDTH, 4 * WIDTH),
        "contract": weight(4 * WIDTH, WIDTH),
    }


def normalize(x):
    centered = x - np.mean(x, axis=-1, keepdims=True)
    return centered / np.sqrt(np.mean(centered**2, axis=-1, keepdims=True) + 1e-5)


def log_softmax(x):
    x = x - np.max(x, axis=-1, keepdims=True)
    return x - np.log(np.sum(np.exp(x), axis=-1, keepdims=True))


def split_heads(x):
    return np.transpose(np.reshape(x, (len(x), CONTEXT, HEADS, -1)), (0, 2, 1, 3))


def attention(x, project):
    q, k, v = (split_heads(part) for part in np.split(x @ project, 3, axis=-1))
    scores = q @ np.swapaxes(k, 2, 3) / (WIDTH // HEADS) ** 0.5
    mixed = np.exp(log_softmax(scores + mask)) @ v
    return np.reshape(np.transpose(mixed, (0, 2, 1, 3)), x.shape)


def loss(params, x):
    embedding = params["embedding"]
    h = embedding["characters"][x[:, :-1]] + embedding["positions"]
    for block in (params["block0"], params["block1"]):
        h = h + attention(normalize(h), block["project"]) @ block["output"]
        h = h + np.maximum(normalize(h) @ block["expand"], 0) @ block["contract"]
    predicted = log_softmax(normalize(h) @ params["head"]["weight"])
    row, place = np.indices((len(x), CONTEXT))
    return -np.mean(predicted[row, place, x[:, 1:]], axis=1)


params = {
    "embedding": {"characters": weight(128, WIDTH), "positions": weight(CONTEXT, WIDTH)},
    "block0": block(),
    "block1": block(),
    "head": {"weight": weight(WIDTH, 128)},
}
moments = {
    (group, name): (np.zeros(array.shape), np.zeros(array.shape))
    for group, arrays in params.items()
    for name, array in arrays.items()
}
mean_loss = value_and_grad(lambda params, x: np.mean(loss(params, x)))
for step in range(1, STEPS + 1):
    batch = windows[rng.integers(len(windows), size=BATCH_SIZE)]
    value, gradients = mean_loss(params, batch)
    for (group, name), (mean, square) in moments.items():
        array = params[group][name]
        gradient = gradients[group][name]
        mean += 0.1 * (gradient - mean)
        square += 0.001 * (gradient**2 - square)
        update = mean / (1 - 0.9**step) / (np.sqrt(square / (1 - 0.999**step)) + 1e-8)
        array -= LEARNING_RATE * (update + WEIGHT_DECAY[group] * array)
    if step % 3 == 0:
        print(f"step {step}: loss {value:.2f}")
