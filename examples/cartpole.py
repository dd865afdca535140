"""Balance a pole without seeing velocities: a policy with memory against the same one without.

    python examples/cartpole.py

Gymnasium's CartPole shows position and angle only here, so a policy has to remember where both were. PPO (Schulman et al., 2017)
trains it on windows of 128 steps of 32 carts. Episodes end in the midst of windows: `reset=` tells the layer where, and the state
is carried from window to window.
"""

import argparse

import gymnasium
import numpy as np
import torch
from torch import Tensor, nn

import throughtime

CARTS, STEPS, DISCOUNT, TRACE, REWARD = 32, 128, 0.99, 0.95, 0.05
SEEN = [0, 2]  # of position, velocity, angle, angular velocity
SCALE = torch.tensor([1.0, 5.0])


class Agent(nn.Module):
    """Observations (T, B, 2) to logits of both actions (T, B, 2) and values (T, B)."""

    def __init__(self, *, has_memory: bool) -> None:
        super().__init__()
        self.memory = throughtime.GRU(2, 64) if has_memory else None
        self.without = nn.Sequential(nn.Linear(2, 64), nn.Tanh())
        self.body = nn.Sequential(nn.Linear(64, 64), nn.Tanh())
        self.policy, self.value = nn.Linear(64, 2), nn.Linear(64, 1)

    def forward(self, seen: Tensor, state: Tensor | None, begins: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """`begins` (T, B) is true where an episode begins."""
        if self.memory is None:
            features = self.without(seen * SCALE)
        else:
            features, state = self.memory(seen * SCALE, state, reset=begins)
        features = self.body(features)
        return self.policy(features), self.value(features).squeeze(2), state


class Carts:
    """A row of carts that begin anew by themselves, one step after an episode's last."""

    def __init__(self, count: int, seed: int) -> None:
        self.carts = gymnasium.make_vec("CartPole-v1", num_envs=count, vectorization_mode="vector_entry_point")
        self.seen = torch.from_numpy(self.carts.reset(seed=seed)[0])[:, SEEN]
        self.is_over = torch.zeros(count, dtype=torch.bool)  # what is seen is an episode's end; the next action is void
        self.begins = torch.ones(count, dtype=torch.bool)

    def step(self, actions: Tensor) -> Tensor:
        """Act, and return who fell; who has stood for 500 steps is over without having fallen."""
        seen, _, fell, cut, _ = self.carts.step(actions.numpy())
        self.begins = self.is_over
        self.seen = torch.from_numpy(seen)[:, SEEN]
        self.is_over = torch.from_numpy(np.logical_or(fell, cut))
        return torch.from_numpy(np.array(fell))


@torch.no_grad()
def play(agent: Agent, carts: Carts, state: Tensor | None) -> tuple[dict[str, Tensor], Tensor | None]:
    """Return a window of experience, each entry (T, B), and the state after it."""
    rows: dict[str, list[Tensor]] = {
        name: [] for name in ("seen", "begins", "is_void", "action", "log_p", "value", "fell")
    }
    for _ in range(STEPS):
        logits, value, state = agent(carts.seen[None], state, carts.begins[None])
        choice = torch.distributions.Categorical(logits=logits[0])
        action = choice.sample()
        before = (carts.seen, carts.begins, carts.is_over, action, choice.log_prob(action), value[0])
        for name, entry in zip(rows, (*before, carts.step(action)), strict=True):
            rows[name].append(entry)
    window = {name: torch.stack(entries) for name, entries in rows.items()}
    following = agent(carts.seen[None], state, carts.begins[None])[1]
    values = torch.cat([window["value"], following])
    ends = torch.cat([window["is_void"][1:], carts.is_over[None]])  # the next thing seen is an episode's end
    advantages, trace = torch.zeros(STEPS, CARTS), torch.zeros(CARTS)
    for t in reversed(range(STEPS)):
        error = REWARD + DISCOUNT * values[t + 1] * ~window["fell"][t] - values[t]
        trace = error + DISCOUNT * TRACE * trace * ~ends[t]
        advantages[t] = trace
    window["returns"] = advantages + window["value"]
    valid = ~window["is_void"]
    window["advantage"] = (advantages - advantages[valid].mean()) / advantages[valid].std()
    return window, state


def improve(agent: Agent, optimiser: torch.optim.Optimizer, window: dict[str, Tensor], state: Tensor | None) -> None:
    """Go over a window four times, eight carts at once, each from the state that its window began with."""
    for _ in range(4):
        for carts in torch.randperm(CARTS).split(8):
            part = {name: entries[:, carts] for name, entries in window.items()}
            logits, value, _ = agent(part["seen"], None if state is None else state[:, carts], part["begins"])
            choice = torch.distributions.Categorical(logits=logits)
            ratio = (choice.log_prob(part["action"]) - part["log_p"]).exp()
            gain = torch.minimum(ratio * part["advantage"], ratio.clamp(0.8, 1.2) * part["advantage"])
            loss = -gain - 0.01 * choice.entropy() + 0.5 * (value - part["returns"]) ** 2
            optimiser.zero_grad()
            loss[~part["is_void"]].mean().backward()
            nn.utils.clip_grad_norm_(agent.parameters(), 0.5)
            optimiser.step()


@torch.no_grad()
def measure(agent: Agent, seed: int) -> float:
    """Return for how many steps, 500 at most, the agent keeps the pole up, a mean over 64 carts."""
    carts, state = Carts(64, seed), None
    is_up, total = torch.ones(64, dtype=torch.bool), 0
    for _ in range(500):
        logits, _, state = agent(carts.seen[None], state, carts.begins[None])
        carts.step(logits[0].argmax(dim=1))
        total += int(is_up.sum())
        is_up &= ~carts.is_over
    return total / 64


def train_and_measure(seed: int, windows: int, *, has_memory: bool) -> float:
    """Train an agent and return how long it lasts in new episodes."""
    torch.manual_seed(seed)
    agent = Agent(has_memory=has_memory)
    optimiser = torch.optim.Adam(agent.parameters(), lr=1e-3, eps=1e-5)
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.1, windows)
    carts = Carts(CARTS, seed)
    state = torch.zeros(1, CARTS, 64) if has_memory else None
    for _ in range(windows):
        window, after = play(agent, carts, state)
        improve(agent, optimiser, window, state)
        schedule.step()
        state = after
    return measure(agent, seed + 1000)


def main() -> None:
    """Train both, and print for how many steps each keeps the pole up in episodes that it hasn't met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=80, help="of 128 steps of 32 carts")
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    print(f"after {given.windows * STEPS * CARTS:,} steps, the pole stays up for, of 500:")
    print(f"  with a GRU       {train_and_measure(given.seed, given.windows, has_memory=True):.1f}")
    print(f"  without memory   {train_and_measure(given.seed, given.windows, has_memory=False):.1f}")


if __name__ == "__main__":
    main()
