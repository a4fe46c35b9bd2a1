"""A trainer that makes DeePMD-kit's calls in DeePMD-kit's order, on a toy model: replaces deepmd.pt.train.training.

Written from the description of those calls. Its LKF is dense and shares no filter code with the package.
"""

import math

import torch

from rlekf_ext.partition import partition


class EnergyStdLoss(torch.nn.Module):
    pass


def stored(tensor):
    return tensor.T if tensor.dim() == 2 else tensor


class LKFOptimizer(torch.optim.Optimizer):
    def __init__(self, params, kalman_lambda=0.98, kalman_nue=0.9987, block_size=5120):
        super().__init__(params, {"lr": 0.1})
        self.parts = self.param_groups[0]["params"]
        self.sizes = partition([p.numel() for p in self.parts], block_size, "deepmd").sizes
        self.blocks = [torch.eye(size, dtype=torch.float64) for size in self.sizes]
        self.memory, self.rate = kalman_lambda, kalman_nue

    def set_grad_prefactor(self, prefactor):
        self.prefactor = prefactor

    @torch.no_grad()
    def step(self, error):
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parts]
        h = torch.cat([stored(g).reshape(-1) for g in gradients]) / self.prefactor
        ph = [p @ part for p, part in zip(self.blocks, h.split(self.sizes), strict=True)]
        a = 1 / (len(ph) * self.memory + torch.cat(ph) @ h)
        self.blocks = [(p - a * torch.outer(k, k)) / self.memory for p, k in zip(self.blocks, ph, strict=True)]
        self.memory = self.rate * self.memory + 1 - self.rate
        for p, d in zip(self.parts, (a * error * torch.cat(ph)).split([p.numel() for p in self.parts]), strict=True):
            stored(p).add_(d.view(stored(p).shape))


def draw(num_atoms):
    """Four groups of six atoms."""
    return torch.randint(num_atoms, (4, 6))


class KFOptimizerWrapper:
    def __init__(self, model, optimizer, atoms_selected, atoms_per_group, is_distributed=False):
        self.model, self.optimizer = model, optimizer

    def update_energy(self, inputs, label, prefactor=1.0):
        energy = self.model(**inputs, skip_loss=True)[0]["energy"]
        self.update(energy, label, inputs["atype"].shape[-1], prefactor, 1)

    def update_force(self, inputs, label, prefactor=1.0):
        atoms = inputs["atype"].shape[-1]
        for group in draw(atoms):
            predicted = self.model(**inputs, skip_loss=True)[0]
            self.update(predicted["force"][:, group], label[:, group], atoms, prefactor, 18)
        return predicted["energy"], predicted["force"]

    def update(self, predicted, label, atoms, prefactor, values):
        difference = label - predicted.detach()
        self.optimizer.zero_grad()
        self.optimizer.set_grad_prefactor(atoms * values)
        (prefactor * difference.sign() * predicted).sum().backward()
        self.optimizer.step(prefactor * difference.abs().mean() / atoms * math.sqrt(len(label)))


class Wrapper(torch.nn.Module):
    """Energies, forces and virials of a smooth function of the coordinates."""

    def __init__(self, seed):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.layers = torch.nn.ModuleList()
        for shapes in (((3, 7), (7,)), ((7, 5), (5,)), ((5, 1),)):
            drawn = [torch.randn(shape, generator=generator, dtype=torch.float64) / 2 for shape in shapes]
            self.layers.append(torch.nn.ParameterList(drawn))
        self.register_buffer("bias", torch.zeros((), dtype=torch.float64))

    def forward(self, coord, atype, box=None, skip_loss=False):
        x = coord.clone().requires_grad_()
        w, b, v, c, u = self.parameters()
        energy = (((x @ w + b).tanh() @ v + c).tanh() @ u).sum((1, 2)) + self.bias * atype.shape[-1]
        (gradient,) = torch.autograd.grad(energy.sum(), x, create_graph=True)
        virial = -gradient.mT @ x
        return {"energy": energy[:, None], "force": -gradient, "virial": virial.flatten(1)}, None, None

    def change_out_bias(self, batches, bias_adjust_mode):
        assert bias_adjust_mode == "change-by-statistic"
        inputs, labels = batches()
        natoms = inputs["atype"].shape[-1]
        self.bias += ((labels["energy"] - self(**inputs)[0]["energy"].detach()) / natoms).mean()


class Trainer:
    def __init__(self, config, training_data, validation_data=None, init_model=None, restart_model=None):
        optimizer = config["optimizer"]
        if optimizer["type"] not in ("Adam", "LKF"):
            raise ValueError(f"Not supported optimizer type '{optimizer['type']}'")
        self.opt_type, self.opt_param = optimizer["type"], optimizer
        self.batches, self.num_steps, self.start_step = training_data, config["training"]["numb_steps"], 0
        self.step_id = 0
        self.loss = EnergyStdLoss() if config["loss"]["type"] == "ener" else torch.nn.Module()
        self.wrapper = self.model = Wrapper(config["training"]["seed"])
        if restart_model:
            saved = torch.load(restart_model, weights_only=True)
            self.model.load_state_dict(saved["model"])
            self.start_step = saved["step"]
        if torch.distributed.is_initialized():
            self.wrapper = torch.nn.parallel.DistributedDataParallel(self.model, find_unused_parameters=True)
        if self.opt_type == "LKF":
            self.optimizer = LKFOptimizer(self.wrapper.parameters(), 0.98, 0.9987, self.opt_param["kf_blocksize"])
        else:
            self.optimizer = torch.optim.Adam(self.wrapper.parameters())

    def get_sample_func(self):
        return self.batches[0]

    def _next_training_batch(self, task_key):
        return *self.batches[self.step_id % len(self.batches)], {}

    def run(self):
        for step in range(self.start_step, self.num_steps):
            self.step_id = step
            self.optimizer.zero_grad(set_to_none=True)
            inputs, labels, _ = self._next_training_batch("Default")
            if self.opt_type == "Adam":
                predicted = self.wrapper(**inputs)[0]
                (predicted["force"] - labels["force"]).square().mean().backward()
                self.optimizer.step()
                continue
            updates = KFOptimizerWrapper(self.wrapper, self.optimizer, 24, 6, False)
            done = self.step_id / self.num_steps
            factor = {}
            for kind in "ef":
                start, limit = (self.opt_param[f"kf_{end}_pref_{kind}"] for end in ("start", "limit"))
                factor[kind] = start * (limit / start) ** done
            updates.update_energy(inputs, labels["energy"], factor["e"])
            self.shown = updates.update_force(inputs, labels["force"], factor["f"])

    def save_model(self, path):
        saved = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "step": self.num_steps}
        for group in saved["optimizer"]["param_groups"]:
            group["lr"] = float(group["lr"])
        torch.save(saved, path)
