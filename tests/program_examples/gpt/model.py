"""A GPT over the characters of a text (Radford et al. 2018), whose embeddings do not decay."""

import autograd.numpy as np

import stepctl

CONTEXT = 16
WIDTH = 16
HEADS = 2

mask = np.triu(np.full((CONTEXT, CONTEXT), -1e9, np.float32), k=1)


def weight(rng, n_in, n_out):
    return rng.normal(0, n_in**-0.5, (n_in, n_out))


def block(rng):
    return {
        "project": weight(rng, WIDTH, 3 * WIDTH),
        "output": weight(rng, WIDTH, WIDTH),
        "expand": weight(rng, WIDTH, 4 * WIDTH),
        "contract": weight(rng, 4 * WIDTH, WIDTH),
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


class GPT(stepctl.LossModel):
    def initial_params(self, rng):
        rng = rng("weights")
        return {
            "embedding": {
                "characters": weight(rng, 128, WIDTH),
                "positions": weight(rng, CONTEXT, WIDTH),
            },
            "block0": block(rng),
            "block1": block(rng),
            "head": {"weight": weight(rng, WIDTH, 128)},
        }

    def loss(self, params, x, y, rng):
        embedding = params["embedding"]
        h = embedding["characters"][x[:, :-1]] + embedding["positions"]
        for block in (params["block0"], params["block1"]):
            h = h + attention(normalize(h), block["project"]) @ block["output"]
            h = h + np.maximum(normalize(h) @ block["expand"], 0) @ block["contract"]
        predicted = log_softmax(normalize(h) @ params["head"]["weight"])
        row, place = np.indices((len(x), CONTEXT))
        return -np.mean(predicted[row, place, x[:, 1:]], axis=1)
