"""Sharpness-aware minimisation around any torch.optim optimizer, in one step or two. Needs torch only: copy this file."""

import inspect
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import compress
from typing import Any

import torch
from torch import Tensor, nn

CLOSED, OPEN, PERTURBED, ASIDE = range(4)  # no step begun; begun; weights are w + e; weights are w, buffers hold e
NOTHING, DIRECTION, OFFSET = range(3)  # what the buffers of a state_dict hold
DIRECTIONS = ("previous", "momentum", "ema", "random")  # of one-step SAM
KEPT = {"sam_buffer", "sam_ema"}  # names in the state of a parameter


class SAM(torch.optim.Optimizer):
    """SAM, ASAM and one-step SAM.

    One-step SAM (S2-SAM, Ji et al., NeurIPS 2024) perturbs the weights along a direction d that it already has, and so
    needs a single forward-backward pass:

        e_t     = rho * T^2 d / (||T d||_2 + 1e-12)     T = |w_t| if adaptive, else 1; no d yet: e_t = 0
        g_t     = gradient of the loss at w_t + e_t
        w_{t+1} = base optimizer's step from w_t with g_t

    One line in the loop that you have: the first training forward pass of a step perturbs, `step()` restores and steps.

        optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.1, momentum=0.9).attach(model)

    The same by hand, without `attach`:

        optimizer.first_step(zero_grad=True)       # w_t -> w_t + e_t
        criterion(model(inputs), targets).backward()
        optimizer.second_step(zero_grad=True)      # back to w_t, remember g_t, step

    Two-step SAM (`v2=False`; Foret et al., ICLR 2021) takes the gradient at w_t for d: run forward and backward before
    `first_step(zero_grad=True)` as well. Adaptive SAM is Kwon et al., ICML 2021, without their eta = 0.01.

    The norm is global. Weights come back bit for bit, by copy. A direction whose norm is not finite perturbs nothing
    (without a norm, only what is finite in it does), and nothing here waits for the device. docs/sam.md has the directions,
    recipes, and what is refused.

    Args:
        params: parameters or groups of them, as for any optimizer; `rho` and `adaptive` are options of a group.
        base_optimizer: an Optimizer class, e.g. torch.optim.SGD; built here with `base_kwargs`.
        rho: signed length of the perturbation: a number, or a scalar tensor that CUDA graphs may fill.
        adaptive: scale the perturbation by the weights (ASAM).
        v2: one step; False for two.
        direction: d of one-step SAM: the `previous` gradient; the base optimizer's `momentum` (MSAM with a negative rho);
            `ema`, an average of gradients; `random`, Gaussian noise on weights whose gradient is not zero.
        beta: of `ema`.
        norm_over: `all` parameters, or those of `perturbed` groups only, whose rho is not 0 (SAM-ON); with `none` e is
            rho T^2 d, not divided by a norm.
        seed: of `random`.
        **base_kwargs: passed to the base optimizer (lr, momentum, ...).

    Raises:
        ValueError: an argument that makes no sense; a base optimizer that needs a closure or has a `rho` of its own.
    """

    def __init__(
        self,
        params: Iterable,
        base_optimizer: type[torch.optim.Optimizer],
        rho: float | Tensor = 0.05,
        adaptive: bool = False,
        v2: bool = True,
        direction: str = "previous",
        beta: float = 0.9,
        norm_over: str = "all",
        seed: int = 0,
        **base_kwargs: Any,
    ):
        _check_base(base_optimizer)
        if direction not in DIRECTIONS or norm_over not in ("all", "perturbed", "none"):
            raise ValueError(f"unknown direction {direction!r} or norm_over {norm_over!r}: see the docstring of SAM")
        if not 0 <= beta < 1:
            raise ValueError(f"beta has to be in [0, 1), not {beta!r}")
        if not v2 and direction != "previous":
            raise ValueError("two-step SAM perturbs along the gradient of its own batch: a direction needs v2=True")
        self.v2, self.direction, self.beta, self.norm_over = v2, direction, beta, norm_over
        self._shared = _Shared(seed)
        self.base_optimizer: Any = None
        super().__init__(params, {"rho": rho, "adaptive": adaptive})
        self.base_optimizer = base_optimizer(self.param_groups, **base_kwargs)
        # One list and one state: what a scheduler sets reaches the base optimizer, and saving is torch's own.
        self.param_groups, self.state = self.base_optimizer.param_groups, self.base_optimizer.state
        self.defaults.update(self.base_optimizer.defaults)
        has_momentum = [group.get("momentum") or (group.get("betas") or [0])[0] for group in self.param_groups]
        if direction == "momentum" and not all(has_momentum):
            raise ValueError(f"direction='momentum' needs one: {base_optimizer.__name__} has none as it is called here")

    # One line: hooks, modes, and a context

    def attach(self, model: nn.Module) -> "SAM":
        """Perturb in the model's training forward passes; have others and `state_dict()` see w. Return self.

        Call it after `fully_shard`, and with the compiled module where there is one. Several models may be attached. A
        SAM of the same parameters that was attached before is detached; call `detach()` before another optimizer trains them.

        Raises:
            ValueError: two-step SAM.
            RuntimeError: something else has written to weights that the SAM before holds perturbed; it is detached then.
        """
        self._refuse_two_steps()
        # Not by their class: a notebook may have defined it twice.
        hooks: list[Any] = [hook for part in model.modules() for hook in part._state_dict_pre_hooks.values()]
        owners: list[Any] = [getattr(getattr(hook, "function", None), "__self__", None) for hook in hooks]
        for other in [owner for owner in owners if hasattr(owner, "_shared") and hasattr(owner, "base_optimizer")]:
            if other._shared is not self._shared and not {*other._parameters()}.isdisjoint(self._parameters()):
                other.detach()
        handles = self._shared.handles
        # Before other hooks: those of fully_shard gather the weights.
        handles.append(model.register_forward_pre_hook(_Hook(self._before_forward), prepend=True))
        for module in model.modules():  # parts are saved and loaded on their own too
            handles.append(module.register_state_dict_pre_hook(_Hook(self._before_saving)))
            handles.append(module.register_load_state_dict_pre_hook(_Hook(self._before_loading)))
            if hasattr(module, "reshard") and hasattr(module, "unshard"):
                self._shared.sharded.append(module)
        return self

    def detach(self) -> None:
        """Undo `attach` and bring w back."""
        try:
            self.restore()
        finally:
            for handle in self._shared.handles:
                handle.remove()
            self._shared.handles.clear()
            self._shared.sharded.clear()

    def train(self) -> None:
        """Perturb now and after each `step()` until `eval()`: for loops without a module to attach to.

        Weights are saved, evaluated and loaded after `eval()`.
        """
        self._shared.training = True
        if not self._shared.handles:
            self._enter()

    @property
    def training(self) -> bool:
        """Whether the weights are at w + e between steps, after `train()`."""
        return self._shared.training and not self._shared.handles

    def eval(self) -> None:
        """Bring w back; `train()` goes on with the same perturbation."""
        self._shared.training = False
        self._leave()

    @contextmanager
    def perturbed(self) -> Iterator[None]:
        """Perturb inside the context: by the same e in all contexts of a step, for micro-batches."""
        self._enter()
        try:
            yield
        finally:
            self._leave()

    @contextmanager
    def unperturbed(self) -> Iterator[None]:
        """Bring w back inside the context, and then what was perturbed before it: for what looks at weights or masks them.

        Forward passes of an attached model see w in it, too.
        """
        was_perturbed = self._shared.phase == PERTURBED
        self._leave()
        self._shared.kept_back += 1
        try:
            yield
        finally:
            self._shared.kept_back -= 1
            if was_perturbed and self._shared.phase == ASIDE:  # nobody ended the step meanwhile
                self._go_on()

    # The two halves

    @torch._disable_dynamo
    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        """Move the weights from w_t to w_t + e_t, in place.

        One-step SAM needs no gradient here, and without a direction leaves the weights alone.

        Raises:
            RuntimeError: two-step SAM without any gradient, or a sparse gradient.
        """
        fresh = self._has_fresh_gradients()
        self.restore()
        if not self.v2:
            if not self._has_gradients():
                raise RuntimeError(
                    "two-step SAM found no gradient to perturb along: run backward() before first_step()"
                )
            self._remember()
        elif fresh and not self._shared.warned:
            self._shared.warned = True
            warnings.warn(
                "one-step SAM does not use the gradient of a backward() before first_step(): leave that pass out, or pass "
                "v2=False for two-step SAM",
                stacklevel=5,  # beyond the decorators
            )
        if zero_grad:
            self.zero_grad()  # before the perturbation is made, so that it takes no memory beside the gradients
        if not self._has_gradients():
            self._shared.zeroed = True  # by the model's zero_grad()
        self._perturb()

    def second_step(self, zero_grad: bool = False) -> None:
        """Bring w_t back, remember the gradients g_t (one-step SAM), and let the base optimizer step with them.

        Raises:
            RuntimeError: no first_step before it, or a sparse gradient.
        """
        SAM.step(self)  # not what a wrapper or a scheduler made of step()
        self._opt_called = True  # what an LRScheduler looks at to know that a step came before it
        if zero_grad:
            self.zero_grad()

    @torch._disable_dynamo
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take the second half of a step; with a closure a whole one, or the rest of one that has begun.

        Args:
            closure: runs forward and backward and returns the loss. Gradients are zeroed before it unless a step has
                begun. Evaluated once by one-step SAM, twice by two-step SAM.

        Returns:
            The first loss of the closure: at w_t + e_t for one-step SAM, at w_t for two-step SAM. None without closure.

        Raises:
            RuntimeError: nothing to step with: no first half, or no gradient from the closure.
        """
        shared = self._shared
        loss = None if closure is None else self._evaluate(closure)
        if shared.phase == CLOSED:
            if any(group.get("lr") != 0 for group in self.param_groups):
                raise RuntimeError(
                    "step() needs a first half before the backward pass it belongs to: first_step(), or a training "
                    "forward pass of the attached model"
                )
            if self.state:  # with lr 0 and on a fresh object this is how torch.distributed.checkpoint has a state made
                return loss
        self._bring_back()
        if self.v2:
            self._remember()  # copied before the step: foreach Nesterov SGD overwrites p.grad
        self.base_optimizer.step()
        self._show_kept()
        shared.phase, shared.zeroed = CLOSED, False
        torch.clear_autocast_cache()
        if self.training:
            self._perturb()
        return loss

    @torch._disable_dynamo
    @torch.no_grad()
    def restore(self) -> None:
        """Bring w_t back, bit for bit, if the weights are perturbed; it can be called at any time.

        After it the interrupted step is forgotten: along `previous` and `random` the next one is not perturbed unless
        `second_step` came between.

        Raises:
            RuntimeError: something else has written to perturbed weights, as wherever w_t is brought back; they stay so.
                Of what was written through `.data` SAM cannot know, and replaces it.
        """
        self._bring_back()
        if self._shared.phase != CLOSED:
            self._shared.phase, self._shared.zeroed = CLOSED, not self._has_gradients()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients, as any optimizer does."""
        super().zero_grad(set_to_none)
        self._shared.zeroed = (
            not self._has_gradients()
        )  # zeros cannot be told from gradients without waiting for the device

    @torch.no_grad()
    def perturbation_stats(self) -> tuple[Tensor, Tensor]:
        """Return ||e_t||_2 and cos(e_t, g_t) over the perturbed weights, on the device; both 0 where there are none.

        To be called between backward and second_step. The cosine says how well the direction that perturbed points along
        the gradient found where it led.
        """
        lots = self._shared.moved if self._shared.phase == PERTURBED else []
        if not lots:
            zero = torch.zeros((), device=next((p.device for p in self._parameters()), None))
            return zero, zero
        pairs = [(lot.gather(lot.params) - lot.buffer, lot.gather(lot.gradients())) for lot in lots]
        e_norm, g_norm = (_norm(lots, list(flats)) for flats in zip(*pairs, strict=True))
        dot = torch.zeros_like(e_norm)
        for lot, (e, g) in zip(lots, pairs, strict=True):
            dtype = torch.promote_types(e.dtype, torch.float32)
            dot += _sum_over_shards((e.to(dtype).conj() * g).sum().real.to(dot), lot.sharding)
        return e_norm, dot / (e_norm * g_norm).clamp_min(torch.finfo(torch.float32).tiny)

    # Groups and state

    def add_param_group(self, param_group: dict) -> None:
        """Add parameters with options of their own; they are perturbed from their second step on.

        Raises:
            ValueError: as in the constructor; parameters of FSDP1, of which a process has a part and does not know it.
        """
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group has to be a dict, not {type(param_group).__name__}")
        rho = param_group.setdefault("rho", self.defaults["rho"])
        param_group.setdefault("adaptive", self.defaults["adaptive"])
        number = isinstance(rho, int | float) and math.isfinite(rho)
        if not (number or (isinstance(rho, Tensor) and rho.ndim == 0 and rho.is_floating_point())):
            raise ValueError(f"rho has to be a finite number or a scalar tensor, not {rho!r}")
        # The constructor of Optimizer calls this for the first groups, when there is no base optimizer to add them to.
        add = super().add_param_group if self.base_optimizer is None else self.base_optimizer.add_param_group
        add(param_group)
        for p in param_group["params"]:
            if getattr(p, "_fsdp_flattened", False):
                raise ValueError("FSDP1 leaves each process a part of the norm: shard with fully_shard (FSDP2) instead")
            if self.direction == "random" and _sharding(p):
                raise ValueError("direction='random' draws by process and does not fit sharded parameters")

    def state_dict(self) -> dict:
        """Return the base optimizer's state_dict with what SAM keeps of each parameter beside it.

        Raises:
            RuntimeError: weights are perturbed by hand, and what is saved now would not be w_t.
        """
        shared = self._shared
        if shared.phase == PERTURBED:
            if not shared.handles:
                raise RuntimeError("weights are perturbed: call second_step(), restore() or eval() before state_dict()")
            self._leave()
        holds = OFFSET if shared.phase == ASIDE else DIRECTION if shared.remembers else NOTHING
        saved = super().state_dict()
        keys = (key for group in saved["param_groups"] for key in group["params"])
        moved = {id(p) for lot in shared.moved for p in lot.owners}  # an e is in the buffers of these alone
        empty = {key for key, p in zip(keys, self._parameters(), strict=True) if holds == OFFSET and id(p) not in moved}
        for key, values in list(saved["state"].items()):
            left_out = {"sam_buffer"} if not holds or key in empty else set()
            kept = {k: v.clone() if k in KEPT else v for k, v in values.items() if k not in left_out}
            saved["state"].pop(key)
            if kept:
                saved["state"][key] = kept
        for group in saved["param_groups"]:
            group["sam_holds"] = holds
            if shared.generator is not None:
                group["sam_generator"] = shared.generator.get_state()
        return saved

    @torch.inference_mode(False)
    @torch.no_grad()
    def load_state_dict(self, state_dict: dict) -> None:
        """Load what `state_dict` returned; a plain base optimizer's state_dict loads too, with nothing remembered.

        A perturbation that is in place is dropped, not undone: load the model's weights first.

        Raises:
            ValueError: other parameters, or the state_dict of a SAM that leaves the base optimizer's out.
        """
        keys = [key for group in state_dict["param_groups"] for key in group["params"]]
        shapes = {key: p.shape for key, p in zip(keys, self._parameters(), strict=False)}
        state = {key: {k: _ordinary(v) for k, v in values.items()} for key, values in state_dict["state"].items()}
        for key, gradient in (state_dict.get("sam_memory") or {}).items():  # where earlier versions had it
            state.setdefault(key, {})["sam_buffer"] = gradient
        for key, values in state.items():
            if values.keys() & {"old_p", "e_w"}:
                raise ValueError(
                    "this is the state of a SAM that does not save its base optimizer's: load weights alone"
                )
            if any(values[k].shape != shapes.get(key) for k in values.keys() & KEPT):
                raise ValueError("the state remembers gradients of other parameters: load it around the same network")
        groups = [dict(group) for group in state_dict["param_groups"]]
        holds = {group.pop("sam_holds", DIRECTION) for group in groups}
        generators = [group.pop("sam_generator", None) for group in groups]
        super().load_state_dict({**state_dict, "state": state, "param_groups": groups})
        for group in self.param_groups:
            group.setdefault("rho", self.defaults["rho"])
            group.setdefault("adaptive", self.defaults["adaptive"])
        shared = self._shared
        shared.phase, shared.lots, shared.moved, shared.signature = CLOSED, [], [], []
        shared.kept = {p: {k: own[k] for k in KEPT & own.keys()} for p, own in self.state.items() if KEPT & own.keys()}
        held = any("sam_buffer" in kept for kept in shared.kept.values())
        shared.remembers = held and DIRECTION in holds and self.direction in ("previous", "random")
        if held and OFFSET in holds:
            shared.phase, shared.moved = ASIDE, self._lots()
        self._show_kept()
        if generators and generators[0] is not None:
            try:
                self._generator(next(self._parameters()).device).set_state(generators[0].cpu())
            except RuntimeError:  # a CPU's state is not a GPU's
                shared.generator = None
                warnings.warn("random directions begin anew: they were drawn on another kind of device", stacklevel=4)

    def __setstate__(self, state: dict) -> None:
        """Let the base optimizer take over a loaded state, in the list and dict that wrappers and it share."""
        base, own, groups = self.base_optimizer, self.state, self.param_groups
        base.__setstate__(state)
        loaded = dict(base.state)
        own.clear()
        own.update(loaded)
        groups[:] = base.param_groups
        base.state, base.param_groups = own, groups

    def __reduce__(self) -> tuple:
        """Refuse to copy and to pickle: both would be apart from the parameters."""
        raise TypeError(
            "SAM cannot be copied or pickled: build one around the other model and load_state_dict(state_dict())"
        )

    # What moves weights

    def _perturb(self) -> None:
        """Begin a step: keep the weights in the buffers and add e to them."""
        shared = self._shared
        lots, directions, weighted = [], [], []  # T^2 d and T d, flat
        for lot in self._lots():
            d = self._direction_of(lot)
            if d is not None:
                sizes = lot.gather(lot.params).abs() if lot.group["adaptive"] else None
                scaled = d if sizes is None else d * sizes
                lots.append(lot)
                weighted.append(scaled)
                directions.append(d if sizes is None else scaled * sizes)
        moves = [_on_device(lot.group["rho"]) or bool(lot.group["rho"] != 0) for lot in lots]
        shared.moved = list(compress(lots, moves))
        if shared.moved:
            counted = moves if self.norm_over == "perturbed" else [True] * len(lots)
            if self.norm_over == "perturbed":  # a tensor may be 0, and is not looked at here
                for place, lot in enumerate(lots):
                    if _on_device(lot.group["rho"]):
                        weighted[place] = torch.where(lot.group["rho"] != 0, weighted[place], 0)
            norm = _norm(list(compress(lots, counted)), list(compress(weighted, counted)))
            for lot, d in zip(shared.moved, compress(directions, moves), strict=True):
                rho = lot.group["rho"]
                if lot.group.get("maximize") and self.direction != "momentum":  # a momentum has that sign already
                    rho = -rho
                if self.norm_over != "none":
                    rho = (norm.to(d.device) + 1e-12).reciprocal() * rho  # the same bits for a number and a tensor
                e = d * rho
                # A norm of inf or NaN has left zeros and NaN: a guard without host.
                (torch.view_as_real(e) if e.is_complex() else e).nan_to_num_(0.0, 0.0, 0.0)
                torch._foreach_copy_(lot.views, lot.params)
                torch._foreach_add_(lot.params, lot.views_of(e))
            self._weights_moved()
        shared.phase, shared.remembers = (PERTURBED if shared.moved else OPEN), False
        shared.versions = self._versions()

    def _bring_back(self) -> None:
        """Copy w from the buffers, if they hold it."""
        shared = self._shared
        if shared.phase == PERTURBED:
            self._refuse_changed_weights()
            for lot in shared.moved:
                torch._foreach_copy_(lot.params, lot.views)
            self._weights_moved()
            shared.phase = OPEN
        shared.moved = []

    @torch.no_grad()
    def _enter(self) -> None:
        """Perturb if this is the first time in a step, or go on with the e that was set aside."""
        self._refuse_two_steps()
        shared = self._shared
        if shared.phase == CLOSED:
            self._perturb()
        elif shared.phase == ASIDE:
            self._go_on()

    @torch.no_grad()
    def _go_on(self) -> None:
        """Perturb by the e that was set aside."""
        shared = self._shared
        moved = {id(p) for lot in shared.moved for p in lot.owners}  # some may have been frozen or converted since
        shared.moved = [lot for lot in self._lots() if not moved.isdisjoint(map(id, lot.owners))]
        for lot in shared.moved:
            e = lot.buffer.clone()
            torch._foreach_copy_(lot.views, lot.params)
            torch._foreach_add_(lot.params, lot.views_of(e))
        self._weights_moved()
        shared.phase, shared.versions = PERTURBED, self._versions()

    @torch.no_grad()
    def _leave(self) -> None:
        """Bring w back and keep e in the buffers."""
        shared = self._shared
        if shared.phase == PERTURBED:
            self._refuse_changed_weights()
            for lot in shared.moved:
                e = lot.gather(lot.params) - lot.buffer
                torch._foreach_copy_(lot.params, lot.views)
                lot.buffer.copy_(e)
            self._weights_moved()
            shared.phase = ASIDE

    def _versions(self) -> list[int]:
        """Return how often each weight that is perturbed was written to."""
        return [p._version for lot in self._shared.moved for p in lot.params]

    def _refuse_changed_weights(self) -> None:
        """Let go of weights that someone else wrote to while they were perturbed: w would replace what was written."""
        shared = self._shared
        if shared.versions != self._versions():
            shared.phase, shared.moved = CLOSED, []
            raise RuntimeError(
                "weights were changed while SAM had them perturbed, and stay as they are: call detach() before another "
                "optimizer trains them, eval() or restore() before they are loaded or changed; a network that changes them in "
                "its forward pass, as by max_norm of nn.Embedding, cannot be trained with SAM"
            )

    def _weights_moved(self) -> None:
        """Drop the copies that others have made of the weights."""
        torch.clear_autocast_cache()
        for module in self._shared.sharded:
            module.reshard()

    def _before_forward(self, module: nn.Module) -> None:
        if module.training and torch.is_grad_enabled() and not self._shared.kept_back:
            self._enter()
        else:
            self._leave()

    def _before_saving(self, module: nn.Module) -> None:
        self._leave()

    def _before_loading(self, module: nn.Module) -> None:
        self.restore()  # the end of the step would bring back what was there before

    # What is remembered

    def _remember(self) -> None:
        """Make the gradients of this step the direction of the next."""
        for lot in self._lots():
            if self.direction == "ema":
                lot.average.lerp_(lot.gather(lot.gradients()), 1 - self.beta)
            elif self.direction != "momentum":
                lot.fill(lot.buffer, lot.views, lot.gradients())  # a parameter without a gradient is not perturbed
                if self.direction == "random":
                    generator = self._generator(lot.buffer.device)
                    like = {"dtype": lot.buffer.dtype, "device": generator.device}
                    noise = torch.randn(len(lot.buffer), generator=generator, **like)
                    lot.buffer.copy_(noise.to(lot.buffer.device) * (lot.buffer != 0))
        self._shared.remembers = self.direction in ("previous", "random")

    def _direction_of(self, lot: "_Lot") -> Tensor | None:
        if self.direction == "momentum":
            states = [self.state.get(p, {}) for p in lot.owners]
            return lot.gather([lot.local(s.get("momentum_buffer", s.get("exp_avg"))) for s in states])
        if self.direction == "ema":
            return lot.average
        return lot.buffer if self._shared.remembers else None

    def _lots(self) -> "list[_Lot]":
        """Return the parameters to perturb, in lots, made anew when groups or what has gradients have changed."""
        shared, kept = self._shared, self._shared.kept
        known = self.state if self.direction == "momentum" else kept
        found = [
            (group, [p for p in group["params"] if p.requires_grad and (p.grad is not None or p in known)])
            for group in self.param_groups
        ]
        signature = [(id(group), [(id(p), p.dtype, p.device) for p in params]) for group, params in found]
        if signature != shared.signature:
            alike: dict[tuple, tuple[dict, list]] = {}
            for group, params in found:
                for p in params:
                    alike.setdefault((id(group), p.device, p.dtype, _sharding(p)), (group, []))[1].append(p)
            shared.lots = [_Lot(*some, self.direction == "ema") for some in alike.values()]
            shared.kept = {p: own for lot in shared.lots for p, own in zip(lot.owners, lot.kept, strict=True)}
            for p, own in kept.items():
                for name in own:
                    shown = self.state[p].pop(name, None) is not None
                    if p in shared.kept and name in shared.kept[p]:
                        shared.kept[p][name].copy_(own[name])
                        if shown:  # a state_dict may come before the step ends
                            self.state[p][name] = shared.kept[p][name]
            shared.signature, shared.shown = signature, False
        return shared.lots

    def _show_kept(self) -> None:
        """Put what is kept into `state`: after a step, for many optimizers begin where they find a state empty."""
        if not self._shared.shown:
            self._shared.shown = True
            for p, own in self._shared.kept.items():
                if self.state.get(p) or p.grad is not None:
                    self.state[p].update(own)
                else:
                    self._shared.shown = False

    def _evaluate(self, closure: Callable[[], Any]) -> Any:
        """Run a closure in the step that has begun, or in one of its own."""
        shared = self._shared
        if shared.phase == CLOSED:
            if self._has_fresh_gradients():
                raise RuntimeError(
                    "gradients were computed before step(closure), which runs the whole step: leave that backward() out, "
                    "or attach(model) to accumulate; with a GradScaler unscale_ and step without a closure"
                )
            self.zero_grad()
            if self.v2 and not shared.handles:
                self._enter()
        elif not (
            shared.zeroed or shared.handles
        ):  # train() or perturbed() has begun the step: gradients are the last one's
            self.zero_grad()
        try:
            with torch.enable_grad():
                loss = closure()
            if shared.phase == CLOSED and not self.v2:
                self.first_step(zero_grad=True)
                with torch.enable_grad():
                    closure()
            if not self._has_gradients():
                raise RuntimeError("the closure computed no gradient: it has to run forward and backward")
        except BaseException:
            with suppress(RuntimeError):  # of weights that the closure changed
                self.restore()  # whoever catches it finds w_t
            raise
        return loss

    def _parameters(self) -> Iterator[Tensor]:
        return (p for group in self.param_groups for p in group["params"])

    def _has_gradients(self) -> bool:
        return any(p.grad is not None for p in self._parameters())

    def _has_fresh_gradients(self) -> bool:
        """Whether a backward pass has run since `zero_grad()` and outside of a step."""
        return self._shared.phase == CLOSED and self._shared.zeroed and self._has_gradients()

    def _generator(self, device: torch.device) -> torch.Generator:
        shared = self._shared
        if shared.generator is None:
            shared.generator = torch.Generator(device).manual_seed(shared.seed)
        return shared.generator

    def _refuse_two_steps(self) -> None:
        if not self.v2:
            raise ValueError("two-step SAM cannot do this: it needs a loop with two passes, or step(closure)")

    @property
    def _opt_called(self) -> bool:
        return self._shared.stepped

    @_opt_called.setter
    def _opt_called(self, value: bool) -> None:
        self._shared.stepped = value


class _Shared:
    """All that changes, in one object: wrappers that copy an optimizer's __dict__ share it."""

    def __init__(self, seed: int):
        self.phase = CLOSED
        self.remembers = False  # buffers hold the direction
        self.lots: list[_Lot] = []
        self.signature: list = []  # what the lots were made for
        self.moved: list[_Lot] = []  # those that are perturbed
        self.versions: list[int] = []  # of their weights, since they are
        self.kept: dict[Tensor, dict[str, Tensor]] = {}  # by parameter, as in `state`
        self.shown = True  # `state` has all that is kept
        self.zeroed = True  # gradients, where there are any, are not those of a step that was taken
        self.training = False  # between train() and eval()
        self.kept_back = 0  # contexts of unperturbed()
        self.stepped = self.warned = False
        self.handles: list = []  # of the hooks on attached models
        self.sharded: list = []  # their modules that hold gathered weights
        self.seed = seed
        self.generator: torch.Generator | None = None


class _Lot:
    """Parameters of one group, device, dtype and sharding, with one flat buffer and a view of it for each.

    On the flat buffer norm, scaling and guard are one call each, however many parameters there are.
    """

    def __init__(self, group: dict, owners: list[Tensor], ema: bool):
        self.group, self.owners, self.sharding = group, owners, _sharding(owners[0])
        self.params = [self.local(p) for p in owners]  # of sharded ones the part of this process
        self.layout, size = [], 0  # shape, stride and offset of each in the buffer: its own layout if that is dense
        for p in self.params:
            self.layout.append((p.shape, torch.empty_like(p, device="meta").stride(), size))
            size += -(-p.numel() // 16) * 16  # every view aligned, for vectorised loads; the padding stays zero
        self.buffer = self.params[0].new_zeros(size)
        self.average = torch.zeros_like(self.buffer if ema else self.buffer[:0])
        self.views = self.views_of(self.buffer)
        self.kept = [{"sam_buffer": v} for v in map(self._as_owner, self.views, owners)]
        if ema:
            for own, view, p in zip(self.kept, self.views_of(self.average), owners, strict=True):
                own["sam_ema"] = self._as_owner(view, p)

    def local(self, t: Any) -> Any:
        """Return a tensor, or the part of a DTensor that this process has when it is laid out as the parameters."""
        if t is None or self.sharding is None:
            return t
        return (t if t.placements == self.sharding[1] else t.redistribute(placements=self.sharding[1])).to_local()

    def gradients(self) -> list[Tensor | None]:
        grads = [p.grad for p in self.owners]
        if any(g is not None and g.is_sparse for g in grads):
            raise RuntimeError("SAM does not support sparse gradients: build the layer with sparse=False")
        return [self.local(g) for g in grads]

    def views_of(self, flat: Tensor) -> list[Tensor]:
        return [flat.as_strided(*place) for place in self.layout]

    def gather(self, tensors: list) -> Tensor:
        """Return a flat copy of tensors, one of each parameter; zeros for those that are not there."""
        flat = torch.empty_like(self.buffer)
        self.fill(flat.zero_(), self.views_of(flat), tensors)
        return flat

    def fill(self, flat: Tensor, views: list[Tensor], tensors: list) -> None:
        """Copy tensors to the views of a flat one, and zeros where there is none."""
        if any(t is None for t in tensors):
            flat.zero_()
            views = [v for v, t in zip(views, tensors, strict=True) if t is not None]
            tensors = [t for t in tensors if t is not None]
        if tensors:
            torch._foreach_copy_(views, tensors)

    def _as_owner(self, view: Tensor, p: Tensor) -> Tensor:
        if self.sharding is None:
            return view
        kind = torch.distributed.tensor.DTensor
        return kind.from_local(view, *self.sharding, run_check=False, shape=p.shape, stride=p.stride())


class _Hook:
    """A hook on a module, a method of a SAM. A copy or a pickle of the module has one that does nothing."""

    def __init__(self, function: Any = None):
        self.function = function

    @torch._disable_dynamo
    def __call__(self, module: nn.Module, *_: Any) -> None:
        if self.function is not None:
            self.function(module)

    def __reduce__(self) -> tuple:
        return _Hook, ()


def _check_base(base: Any) -> None:
    kind = torch.optim.Optimizer
    if not (isinstance(base, type) and issubclass(base, kind) and base is not kind):
        raise ValueError(f"base_optimizer has to be an Optimizer class such as torch.optim.SGD, not {base!r}")
    if inspect.signature(base).parameters.keys() & {"rho", "adaptive"}:
        raise ValueError(f"{base.__name__} has a rho or adaptive of its own, which SAM's would replace")
    closure = inspect.signature(base.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(f"{base.__name__} evaluates its closure as often as it likes and cannot go in SAM")


def _sharding(p: Tensor) -> tuple | None:
    """Return the device mesh and the placements of a DTensor."""
    placements = getattr(p, "placements", None)
    return None if placements is None else (getattr(p, "device_mesh", None), placements)


def _sum_over_shards(value: Tensor, sharding: tuple | None) -> Tensor:
    for dim, placement in enumerate(sharding[1] if sharding else ()):
        if sharding and not placement.is_replicate():
            torch.distributed.all_reduce(value, group=sharding[0].get_group(dim))
    return value


def _norm(lots: list[_Lot], flats: list[Tensor]) -> Tensor:
    """Return the 2-norm of all flat tensors together, at least in float32, on the first one's device."""
    norms = []
    for lot, flat in zip(lots, flats, strict=True):
        norm = torch.linalg.vector_norm(flat, dtype=torch.promote_types(flat.dtype, torch.float32)).to(flats[0].device)
        if lot.sharding:
            norm = _sum_over_shards(norm.double() ** 2, lot.sharding).sqrt().to(norm.dtype)
        norms.append(norm)
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))


def _on_device(rho: Any) -> bool:
    """Return whether rho is a tensor whose value only a wait for its device would tell."""
    return isinstance(rho, Tensor) and rho.device.type != "cpu"


def _ordinary(value: Any) -> Any:
    """Return a tensor that was loaded under inference_mode as one that may be changed in place."""
    return value.clone() if isinstance(value, Tensor) and value.is_inference() else value
