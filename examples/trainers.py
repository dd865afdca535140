"""Let somebody else's loop train a GRU: the same reader of digits by Lightning and by Accelerate.

    pip install lightning accelerate
    python examples/trainers.py

A layer of ours is an `nn.Module` to both. The images are scikit-learn's: 1,797 of 8 × 8 pixels, and a row of pixels is a step.
"""

import argparse

import accelerate
import lightning
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import throughtime


class RowReader(nn.Module):
    """Images (B, 8, 8) to logits (B, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = throughtime.GRU(8, 64, batch_first=True, bidirectional=True)
        self.readout = nn.Linear(2 * 64, 10)

    def forward(self, images: Tensor) -> Tensor:  # noqa: D102
        return self.readout(torch.cat(tuple(self.gru(images)[1]), dim=1))


class ByLightning(lightning.LightningModule):
    """The reader, its loss and its optimiser, as Lightning asks for them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:  # noqa: D102
        return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:  # noqa: D102
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def train_by_lightning(model: nn.Module, batches: DataLoader, epochs: int) -> None:
    """Hand the reader to a Trainer, which keeps nothing on disk here."""
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    lightning.Trainer(accelerator="cpu", devices=1, max_epochs=epochs, gradient_clip_val=1.0, **quiet).fit(
        ByLightning(model), batches
    )


def train_by_accelerate(model: nn.Module, batches: DataLoader, epochs: int) -> None:
    """Write the loop, and let Accelerate place what it needs."""
    accelerator = accelerate.Accelerator(cpu=True)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model, optimiser, batches = accelerator.prepare(model, optimiser, batches)
    for _ in range(epochs):
        for images, digits in batches:
            optimiser.zero_grad()
            accelerator.backward(nn.functional.cross_entropy(model(images), digits))
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()


def main() -> None:
    """Train by both, and print which share of the images that nobody was trained on they know."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    x, y = load_digits(return_X_y=True)
    x_train, x_test, y_train, y_test = train_test_split(x / 16, y, test_size=0.25, random_state=given.seed, stratify=y)
    known = TensorDataset(torch.tensor(x_train).float().view(-1, 8, 8), torch.tensor(y_train))
    print(f"of {len(y_test)} images, known:")
    for name, train in {"GRU by Lightning": train_by_lightning, "GRU by Accelerate": train_by_accelerate}.items():
        torch.manual_seed(given.seed)
        model = RowReader()
        train(model, DataLoader(known, batch_size=64, shuffle=True), given.epochs)
        with torch.no_grad():
            answers = model(torch.tensor(x_test).float().view(-1, 8, 8)).argmax(dim=1)
        print(f"  {name:22}{(answers.numpy() == y_test).mean():.4f}")
    linear = LogisticRegression(max_iter=1000).fit(x_train, y_train)
    print(f"  {'logistic regression':22}{linear.score(x_test, y_test):.4f}")


if __name__ == "__main__":
    main()
