"""A recurrent network that predicts the next character, with its hidden state carried along the text (min-char-rnn)."""

import numpy as np

import stepctl

N_HIDDEN = 16
LENGTH = 20  # characters of a step
LEARNING_RATE = 0.1
TEXT = """Call me Ishmael. Some years ago - never mind how long precisely - having little or no
money in my purse, and nothing particular to interest me on shore, I thought I would sail about a
little and see the watery part of the world. It is a way I have of driving off the spleen and
regulating the circulation. Whenever I find myself growing grim about the mouth; whenever it is a
damp, drizzly November in my soul; then, I account it high time to get to sea as soon as I can."""

alphabet = sorted(set(TEXT))
text = np.array([alphabet.index(character) for character in TEXT])
n_parts = (len(text) - 1) // LENGTH


def loss_and_gradients(params, x, y, hidden):
    """Return the summed cross-entropy of the characters y that follow x, its gradients, and the last hidden state."""
    states = [hidden]
    for character in x:
        z = params["input"][character] + states[-1] @ params["recurrent"] + params["bias"]
        states.append(np.tanh(z))
    logits = np.array(states[1:]) @ params["output"] + params["output_bias"]
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    places = np.arange(len(y))
    loss = -np.log(p[places, y]).sum()
    dlogits = p.copy()
    dlogits[places, y] -= 1

    gradients = {name: np.zeros_like(array) for name, array in params.items()}
    gradients["output"] += np.array(states[1:]).T @ dlogits
    gradients["output_bias"] += dlogits.sum(axis=0)
    dstate = np.zeros(N_HIDDEN)
    for t in reversed(range(len(x))):
        dstate = dstate + params["output"] @ dlogits[t]
        dz = dstate * (1 - states[t + 1] ** 2)
        gradients["input"][x[t]] += dz
        gradients["recurrent"] += np.outer(states[t], dz)
        gradients["bias"] += dz
        dstate = params["recurrent"] @ dz
    return loss, gradients, states[-1]


class CharRNN(stepctl.Program):
    """One step learns from the next part of the text."""

    def initial_state(self, rng):
        rng = np.random.default_rng(0)
        params = {
            "input": rng.normal(0, 0.1, (len(alphabet), N_HIDDEN)),
            "recurrent": rng.normal(0, 0.1, (N_HIDDEN, N_HIDDEN)),
            "bias": np.zeros(N_HIDDEN),
            "output": rng.normal(0, 0.1, (N_HIDDEN, len(alphabet))),
            "output_bias": np.zeros(len(alphabet)),
        }
        squares = {name: np.zeros_like(array) for name, array in params.items()}
        hidden = np.zeros(N_HIDDEN)
        return {"params": params, "squares": squares, "hidden": hidden}

    def step(self, state, step, rng):
        params = state["params"]
        squares = state["squares"]
        hidden = state["hidden"]
        start = step % n_parts * LENGTH
        if start == 0:
            hidden[:] = 0
        part = text[start : start + LENGTH + 1]
        loss, gradients, hidden[:] = loss_and_gradients(params, part[:-1], part[1:], hidden)
        for name, gradient in gradients.items():  # Adagrad
            np.clip(gradient, -5, 5, out=gradient)
            squares[name] += gradient**2
            params[name] -= LEARNING_RATE * gradient / np.sqrt(squares[name] + 1e-8)
        return {"loss": loss / LENGTH}
