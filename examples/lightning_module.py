"""RLEKF in PyTorch Lightning, under manual optimization. Needs `pip install lightning`, which rlekf_ext does not."""

import lightning
import torch

from rlekf_ext import RLEKF, Stepper


class Regression(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False  # the optimizer needs the error and its gradient
        self.network = torch.nn.Sequential(torch.nn.Linear(2, 20), torch.nn.Tanh(), torch.nn.Linear(20, 1))

    def configure_optimizers(self):
        return RLEKF(self.parameters(), memory_factor=0.998)

    def training_step(self, batch, batch_idx):
        x, label = batch
        # The bare optimizer: Lightning's wrapper would count its own steps and wrap the closure.
        step = Stepper(self.optimizers(use_pl_optimizer=False), backward=self.manual_backward)
        self.log("error", step(self.network(x)[:, 0], label), prog_bar=True)


def batch(i):
    x = torch.randn(16, 2, generator=torch.Generator().manual_seed(i))
    return x, torch.sin(x[:, 0]) * x[:, 1]


def main():
    data = torch.utils.data.DataLoader([batch(i) for i in range(200)], batch_size=None)
    lightning.Trainer(max_epochs=2, logger=False, enable_checkpointing=False, accelerator="cpu").fit(Regression(), data)


if __name__ == "__main__":
    main()
