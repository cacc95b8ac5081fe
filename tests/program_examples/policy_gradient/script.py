"""Policy gradient (REINFORCE, with the mean of recent returns as the baseline) for a walker on an icy bridge."""

import numpy as np

import stepctl

SEED = 0
N_STEPS = 40
N_EPISODES = 4
LEARNING_RATE = 0.2
MOMENTUM = 0.8
WIDTH, LENGTH = 5, 6
MOVES = np.array([[-1, 0], [1, 0], [0, 1]])  # left, right, forward


class Bridge:
    """A bridge of WIDTH by LENGTH squares; a walker slips to a side with probability 0.2."""

    def reset(self):
        self.position = np.array([WIDTH // 2, 0])
        return self.position

    def move(self, action, rng):
        """Return (position, reward, done)."""
        self.position = self.position + MOVES[action]
        if rng.random() < 0.2:
            self.position = self.position + MOVES[rng.integers(2)]
        if not 0 <= self.position[0] < WIDTH:
            return self.position, -1.0, True
        if self.position[1] == LENGTH:
            return self.position, 1.0, True
        return self.position, -0.02, False


def probabilities(logits):
    """Return the softmax."""
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


bridge = Bridge()
policy = np.zeros((WIDTH, LENGTH, len(MOVES)))
velocity = np.zeros_like(policy)
returns = []

state = {"policy": policy, "velocity": velocity, "returns": returns}
with stepctl.loop("runs/policy_gradient", state, last_step=N_STEPS, seed=SEED) as run:
    for _ in run:
        actions_rng = run.rng("actions")
        ice_rng = run.rng("ice")
        baseline = np.mean(returns[-20:]) if returns else 0.0
        gradient = np.zeros_like(policy)
        total = 0.0
        for _ in range(N_EPISODES):
            visits = []
            gain = 0.0
            x, y = bridge.reset()
            done = False
            while not done and len(visits) < 15:
                p = probabilities(policy[x, y])
                action = actions_rng.choice(len(MOVES), p=p)
                visits.append((x, y, action, p))
                (x, y), reward, done = bridge.move(action, ice_rng)
                gain += reward
            for x, y, action, p in visits:
                gradient[x, y] -= (gain - baseline) * p
                gradient[x, y, action] += gain - baseline
            total += gain
        velocity *= MOMENTUM
        velocity += gradient / N_EPISODES
        policy += LEARNING_RATE * velocity
        returns.append(total / N_EPISODES)
        run.log(episode_return=returns[-1])

print(returns)
