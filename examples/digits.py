"""Handwritten digits, read row by row: a GRU against a linear model that sees the whole image at once.

    python examples/digits.py

The images are scikit-learn's: 1,797 of 8 × 8 pixels. A row of pixels is a step, the answer is read from the last state.
"""

import argparse

import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import throughtime


class RowReader(nn.Module):
    """Images (B, 8, 8) to logits (B, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = throughtime.GRU(8, 64, batch_first=True, bidirectional=True)
        self.readout = nn.Linear(2 * 64, 10)

    def forward(self, images: Tensor) -> Tensor:  # noqa: D102
        _, h = self.gru(images)  # (2, B, 64): where reading downwards ended, and upwards
        return self.readout(torch.cat(tuple(h), dim=1))


def train(model: nn.Module, images: Tensor, digits: Tensor, epochs: int) -> None:
    """Minimise the cross-entropy, in batches of 64."""
    steps = -(-len(images) // 64) * epochs
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in range(epochs):
        for rows in torch.randperm(len(images)).split(64):
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(images[rows]), digits[rows]).backward()
            optimiser.step()
            schedule.step()


def main() -> None:
    """Train both, and print which share of the images that neither was trained on they know."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    torch.manual_seed(given.seed)
    x, y = load_digits(return_X_y=True)
    x_train, x_test, y_train, y_test = train_test_split(x / 16, y, test_size=0.25, random_state=given.seed, stratify=y)

    linear = LogisticRegression(max_iter=1000).fit(x_train, y_train)
    model = RowReader()
    train(model, torch.tensor(x_train).float().view(-1, 8, 8), torch.tensor(y_train), given.epochs)
    with torch.no_grad():
        answers = model(torch.tensor(x_test).float().view(-1, 8, 8)).argmax(dim=1)
    print(f"of {len(y_test)} images, known:")
    print(f"  GRU, row by row       {(answers.numpy() == y_test).mean():.4f}")
    print(f"  logistic regression   {linear.score(x_test, y_test):.4f}")


if __name__ == "__main__":
    main()
