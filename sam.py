"""Sharpness-aware minimisation around torch.optim optimizers, in one step (SAM.v2) or two. Needs torch only."""

import inspect
import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor


class SAM(torch.optim.Optimizer):
    """SAM, ASAM and one-step SAM.v2.

    One-step SAM (Ji et al., NeurIPS 2024) perturbs the weights along the gradient of the *previous* step, which it kept,
    and so needs a single forward-backward pass. With g_{t-1} that gradient, taken at its own perturbed weights:

        e_t     = rho * T^2 g_{t-1} / (||T g_{t-1}||_2 + 1e-12)    T = |w_t| if adaptive, else 1; no g_{t-1}: e_t = 0
        g_t     = gradient of the loss at w_t + e_t
        w_{t+1} = base optimizer's step from w_t with g_t

    Its loop (the first step has nothing to perturb along and is the base optimizer's):

        optimizer.zero_grad()
        optimizer.first_step(zero_grad=True)       # w_t -> w_t + e_t
        loss = criterion(model(inputs), targets)
        loss.backward()
        optimizer.second_step(zero_grad=True)      # back to w_t, remember g_t, step

    Two-step SAM (`v2=False`; Foret et al., ICLR 2021) takes the gradient at w_t in the place of g_{t-1}: run forward and
    backward before `first_step(zero_grad=True)` as well. Batch norm then sees every batch twice; whoever wants its
    running statistics at w_t alone has to freeze them in the second pass.

    Adaptive SAM is Kwon et al., ICML 2021 (equation 8) without their eta = 0.01 added to |w|, as in the common PyTorch
    implementations that published values of rho refer to. A useful adaptive rho is about ten times a plain one.

    The norm is global, over all parameters of all groups. `rho` and `adaptive` are options of a parameter group. Beside
    the base optimizer's state this keeps one buffer a parameter, which holds g_{t-1} between steps and w_t while the
    weights are perturbed: they come back bit for bit. Nothing here waits for the device. A perturbing gradient with a
    non-finite norm perturbs nothing, on the device. Gradients have to be dense, and parameters stay on their device and
    in their dtype once it has stepped. Step hooks belong on `base_optimizer`: `second_step` calls that one's.

    Gradient accumulation: `first_step` before the first micro-batch, `second_step` after the last (two-step SAM runs all
    micro-batches twice). Clip, or mask, gradients before `second_step` (and, in two-step SAM, before `first_step`).

    With a GradScaler, `step()` stands for `second_step()` and gradients are unscaled before they are remembered:

        optimizer.first_step(zero_grad=True)
        scaler.scale(criterion(model(inputs), targets)).backward()
        scaler.unscale_(optimizer)                 # then clip
        scaler.step(optimizer)                     # second_step, or nothing if a gradient overflowed
        scaler.update()
        optimizer.restore()                        # only after a skipped step: back to w_t, unperturbed next time

    For two-step SAM put a scaled forward and backward before `first_step`: the perturbation does not depend on the scale.
    Never pass a closure through a scaler.

    Args:
        params: parameters or groups of them, as for any optimizer.
        base_optimizer: an Optimizer class, e.g. torch.optim.SGD; built here with `base_kwargs`.
        rho: radius of the perturbation, >= 0, in the units of the weights (adaptive: relative to them).
        adaptive: scale the perturbation by the weights (ASAM).
        v2: one step, along the previous gradient; False for two.
        **base_kwargs: passed to the base optimizer (lr, momentum, ...).

    Raises:
        ValueError: rho not a finite number >= 0; base_optimizer not an Optimizer class, or one that needs a closure
            (LBFGS) or has a `rho` of its own (Adadelta).
    """

    def __init__(
        self,
        params: Iterable,
        base_optimizer: type[torch.optim.Optimizer],
        rho: float = 0.05,
        adaptive: bool = False,
        v2: bool = True,
        **base_kwargs,
    ):
        kind = torch.optim.Optimizer
        if not (isinstance(base_optimizer, type) and issubclass(base_optimizer, kind) and base_optimizer is not kind):
            raise ValueError(
                f"base_optimizer has to be an Optimizer class such as torch.optim.SGD, not {base_optimizer!r}"
            )
        parameters = inspect.signature(base_optimizer).parameters
        if parameters.keys() & {"rho", "adaptive"}:
            raise ValueError(f"{base_optimizer.__name__} has a rho or adaptive of its own, which SAM's would replace")
        closure = inspect.signature(base_optimizer.step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            raise ValueError(
                f"{base_optimizer.__name__} evaluates its closure as often as it likes and cannot go in SAM"
            )
        self.v2 = v2
        self.base_optimizer: torch.optim.Optimizer | None = None
        self._blocks: list[_Block] = []
        self._covered = 0  # groups that have their blocks
        self._begun = False  # first_step was called, second_step was not
        self._perturbed = False  # weights are w + e, buffers hold w
        self._remembers = False  # buffers hold the gradient to perturb along
        super().__init__(params, {"rho": rho, "adaptive": adaptive})
        self.base_optimizer = base_optimizer(self.param_groups, **base_kwargs)
        # One list: what a scheduler sets reaches the base optimizer.
        self.param_groups = self.base_optimizer.param_groups
        self.defaults.update(self.base_optimizer.defaults)

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        """Move the weights from w_t to w_t + e_t, in place.

        One-step SAM needs no gradient here, and without a remembered one leaves the weights alone.

        Raises:
            RuntimeError: two-step SAM without any gradient, or a sparse gradient.
        """
        self.restore()
        self._cover_new_groups()
        if not self.v2:
            if all(p.grad is None for group in self.param_groups for p in group["params"]):
                raise RuntimeError(
                    "two-step SAM found no gradient to perturb along: run backward() before first_step()"
                )
            self._remember_gradients()
        if zero_grad:
            self.zero_grad()  # before the perturbation is made, so that it takes no memory beside the gradients
        if self._remembers:
            directions = [block.direction() for block in self._blocks]
            norm = _global_norm([scaled for _, scaled in directions])
            for block, (direction, _) in zip(self._blocks, directions, strict=True):
                block.perturb(direction, norm)
            self._perturbed, self._remembers = True, False
        self._begun = True

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        """Bring w_t back, remember the gradients g_t (one-step SAM), and let the base optimizer step with them.

        Raises:
            RuntimeError: no first_step before it, or a sparse gradient.
        """
        if not self._begun:
            raise RuntimeError("second_step() and step() need a first_step() before the forward pass they belong to")
        self.restore()
        if self.v2:
            self._remember_gradients()  # copied before the step: foreach Nesterov SGD overwrites p.grad
        self.base_optimizer.step()
        self._opt_called = True  # what an LRScheduler looks at to know that a step came before it
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def restore(self) -> None:
        """Bring w_t back, bit for bit, if the weights are perturbed. Safe to call at any time and any number of times.

        After it, the interrupted step is forgotten: the next one is not perturbed unless `second_step` came between.
        """
        if self._perturbed:
            for block in self._blocks:
                block.restore()
        self._perturbed = self._begun = False

    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Without a closure `second_step()`; with one a whole step.

        Args:
            closure: zeroes the gradients, runs forward and backward, returns the loss. Evaluated once by one-step SAM,
                twice by two-step SAM.

        Returns:
            The first loss of the closure: at w_t + e_t for one-step SAM, at w_t for two-step SAM. None without closure.

        Raises:
            RuntimeError: no first_step before a step without closure; a closure passed through a GradScaler.
        """
        if closure is None:
            self.second_step()
            return None
        _refuse_grad_scaler()
        try:
            if self.v2:
                self.first_step()
            with torch.enable_grad():
                loss = closure()
            if not self.v2:
                self.first_step()
                with torch.enable_grad():
                    closure()
        except BaseException:
            self.restore()  # whoever catches it finds w_t
            raise
        self.second_step()
        return loss

    @torch.no_grad()
    def perturbation_stats(self) -> tuple[Tensor, Tensor]:
        """||e_t||_2 and cos(e_t, g_t), scalars on the device; both 0 where nothing is perturbed.

        To be called between backward and second_step. The cosine says how well the gradient that perturbed (one step
        old in one-step SAM) points along the gradient found where it led.
        """
        if not self._perturbed:
            zero = torch.zeros((), device=self.param_groups[0]["params"][0].device)
            return zero, zero
        pairs = [
            (block.weights() - block.buffer, block.gather([p.grad for p in block.params])) for block in self._blocks
        ]
        e_norm, g_norm = (_global_norm(list(tensors)) for tensors in zip(*pairs, strict=True))
        dot = sum((e.to(e_norm.dtype) * g).sum().to(e_norm.device) for e, g in pairs)
        return e_norm, dot / (e_norm * g_norm).clamp_min(torch.finfo(torch.float32).tiny)

    def add_param_group(self, param_group: dict) -> None:
        """Add parameters with options of their own; they are perturbed from their second step on.

        Raises:
            ValueError: as in the constructor.
        """
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group has to be a dict, not {type(param_group).__name__}")
        rho = param_group.setdefault("rho", self.defaults["rho"])
        param_group.setdefault("adaptive", self.defaults["adaptive"])
        if not (isinstance(rho, int | float) and math.isfinite(rho) and rho >= 0):
            raise ValueError(f"rho has to be a finite number and not negative, not {rho!r}")
        # The constructor of Optimizer calls this for the first groups, when there is no base optimizer to add them to.
        (super() if self.base_optimizer is None else self.base_optimizer).add_param_group(param_group)

    def state_dict(self) -> dict:
        """The base optimizer's state_dict and, under "sam_memory", the remembered gradients by parameter number (or None).

        Raises:
            RuntimeError: weights are perturbed: what is saved now would not be w_t.
        """
        if self._perturbed:
            raise RuntimeError("weights are perturbed: call second_step() or restore() before state_dict()")
        memory = None
        if self._remembers:
            self._cover_new_groups()
            params = [p for group in self.param_groups for p in group["params"]]
            memory = {index: self.state[p]["sam_buffer"] for index, p in enumerate(params)}
        return {**self.base_optimizer.state_dict(), "sam_memory": memory}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict) -> None:
        """Load what `state_dict` returned; a plain base optimizer's state_dict loads too, with nothing remembered.

        A perturbation that is in place is dropped, not undone: load the model's weights as well.

        Raises:
            ValueError: other number or sizes of parameter groups, or other shapes of what is remembered.
        """
        memory = state_dict.get("sam_memory")
        params = [p for group in self.param_groups for p in group["params"]]
        if memory is not None and {i: m.shape for i, m in memory.items()} != {i: p.shape for i, p in enumerate(params)}:
            raise ValueError("the state remembers gradients of other parameters: load it around the same network")
        self.base_optimizer.load_state_dict({key: state_dict[key] for key in ("state", "param_groups")})
        self.param_groups = self.base_optimizer.param_groups
        for group in self.param_groups:
            group.setdefault("rho", self.defaults["rho"])
            group.setdefault("adaptive", self.defaults["adaptive"])
        self._blocks, self._covered = [], 0
        self._begun = self._perturbed = False
        self._remembers = memory is not None
        if self._remembers:
            self._cover_new_groups()
            for index, p in enumerate(params):
                self.state[p]["sam_buffer"].copy_(memory[index])

    def __deepcopy__(self, memo: dict) -> "SAM":
        raise TypeError("SAM cannot be copied apart from its parameters: build one around theirs and load_state_dict")

    def __reduce__(self) -> tuple:
        raise TypeError("SAM cannot be pickled: save its state_dict()")

    def _cover_new_groups(self) -> None:
        for group in self.param_groups[self._covered :]:
            alike: dict = {}
            for p in group["params"]:
                alike.setdefault((p.device, p.dtype), []).append(p)
            for params in alike.values():
                block = _Block(group, params)
                self._blocks.append(block)
                for p, view in zip(block.params, block.views, strict=True):
                    self.state[p]["sam_buffer"] = view
        self._covered = len(self.param_groups)

    def _remember_gradients(self) -> None:
        self._cover_new_groups()
        for block in self._blocks:
            block.remember_gradients()
        self._remembers = True


@torch.no_grad()
def flatten_parameters(params: Iterable[Tensor]) -> None:
    """Move parameters into one piece of memory, where SAM perturbs and restores all of them by one call each.

    Their values stay, and so do the parameters: only their memory changes, as by `model.to()`, which undoes this. SAM
    needs none of it; call it before building one, with the parameters of a group in their order.

    Args:
        params: of one device and dtype.
    """
    params = list(params)
    for p, view in zip(params, _views(*_zeros_for(params)), strict=True):
        view.copy_(p)
        p.data = view


class _Block:
    """Parameters of one group on one device in one dtype, and one flat buffer with a view in the shape of each.

    On the flat buffer norm, scaling and guard are one call each, however many parameters there are. Where the parameters
    lie in memory as its views do, so are keeping, adding and restoring.
    """

    def __init__(self, group: dict, params: list[Tensor]):
        self.group, self.params = group, params
        self.buffer, self.layout = _zeros_for(params)
        self.views = self.views_of(self.buffer)
        self._flat = self._find_flat()

    def views_of(self, flat: Tensor) -> list[Tensor]:
        return _views(flat, self.layout)

    def _find_flat(self) -> Tensor | None:
        """The memory that the parameters share as one tensor, if flatten_parameters laid them out."""
        storage, start = self.params[0].untyped_storage(), self.params[0].storage_offset()
        for p, (_, stride, offset) in zip(self.params, self.layout, strict=True):
            if (p.untyped_storage().data_ptr(), p.storage_offset(), p.stride()) != (
                storage.data_ptr(), start + offset, stride,
            ):  # fmt: skip
                return None
        if storage.nbytes() < (start + len(self.buffer)) * self.buffer.element_size():
            return None
        flat = self.params[0].detach().as_strided(self.buffer.shape, (1,), start)
        self._addresses = [p.data_ptr() for p in self.params]
        return flat

    def flat(self) -> Tensor | None:
        """The same, as long as no parameter was moved: `_flat` keeps the memory from serving anyone else."""
        if self._flat is not None and [p.data_ptr() for p in self.params] != self._addresses:
            self._flat = None
        return self._flat

    def weights(self) -> Tensor:
        """The parameters as one tensor: their own memory if that is one, or a copy."""
        flat = self.flat()
        return self.gather(self.params) if flat is None else flat

    def gather(self, tensors: list[Tensor | None]) -> Tensor:
        """A flat copy of tensors, one a parameter; zeros for those that are not there."""
        flat = torch.zeros_like(self.buffer)
        present = [(v, t) for v, t in zip(self.views_of(flat), tensors, strict=True) if t is not None]
        if present:
            torch._foreach_copy_([v for v, _ in present], [t for _, t in present])
        return flat

    def remember_gradients(self) -> None:
        grads = [p.grad for p in self.params]
        views = self.views
        if any(g is None or g.is_sparse for g in grads):
            if any(g is not None and g.is_sparse for g in grads):
                raise RuntimeError("SAM does not support sparse gradients: build the layer with sparse=False")
            self.buffer.zero_()  # a parameter without a gradient is not perturbed
            present = [(v, g) for v, g in zip(views, grads, strict=True) if g is not None]
            views, grads = [v for v, _ in present], [g for _, g in present]
        if grads:
            torch._foreach_copy_(views, grads)

    def direction(self) -> tuple[Tensor, Tensor]:
        """T^2 g and T g as flat tensors, g being what the buffer holds; both g itself if not adaptive."""
        if not self.group["adaptive"]:
            return self.buffer, self.buffer
        weights = self.weights()
        scaled = self.buffer * weights  # w in the place of T = |w|: the norm and the square are the same
        return scaled * weights, scaled

    def perturb(self, direction: Tensor, norm: Tensor) -> None:
        """Keep the weights in the buffer and add rho * direction / norm to them, nothing where norm is not finite."""
        unit = direction / (norm.to(direction.device) + 1e-12)
        unit.nan_to_num_(0.0, 0.0, 0.0)  # a norm of inf or NaN has left zeros and NaN: a guard without host or mask
        flat = self.flat()
        if flat is None:
            torch._foreach_copy_(self.views, self.params)
            torch._foreach_add_(self.params, self.views_of(unit), alpha=self.group["rho"])
        else:
            self.buffer.copy_(flat)
            flat.add_(unit, alpha=self.group["rho"])

    def restore(self) -> None:
        flat = self.flat()
        if flat is None:
            torch._foreach_copy_(self.params, self.views)
        else:
            flat.copy_(self.buffer)


Layout = list[tuple[torch.Size, tuple[int, ...], int]]  # shape, stride and offset of each parameter in a flat tensor


def _zeros_for(params: list[Tensor]) -> tuple[Tensor, Layout]:
    """A flat tensor with room for all parameters, and where each goes: in its own layout if that is dense."""
    layout, size = [], 0
    for p in params:
        layout.append((p.shape, torch.empty_like(p, device="meta").stride(), size))
        size += -(-p.numel() // 16) * 16  # every view aligned, for vectorised loads; the padding stays zero
    return torch.zeros(size, dtype=params[0].dtype, device=params[0].device), layout


def _views(flat: Tensor, layout: Layout) -> list[Tensor]:
    return [flat.as_strided(*place) for place in layout]


def _global_norm(tensors: list[Tensor]) -> Tensor:
    """The 2-norm of all tensors together, at least in float32, on the first one's device."""
    norms = [torch.linalg.vector_norm(t, dtype=torch.promote_types(t.dtype, torch.float32)) for t in tensors]
    if len(norms) == 1:
        return norms[0]
    return torch.linalg.vector_norm(torch.stack([n.to(norms[0].device) for n in norms]))


def _refuse_grad_scaler() -> None:
    """Raise if an enabled GradScaler is calling `SAM.step(closure)`: the closure's gradients would stay scaled."""
    frame = inspect.currentframe()
    for _ in range(8):  # step, its wrappers (profiler, LRScheduler), then the scaler's own two frames
        frame = frame.f_back if frame else None
        caller = frame.f_locals.get("self") if frame else None
        if isinstance(caller, torch.amp.GradScaler) and caller.is_enabled():
            raise RuntimeError(
                "a closure would step on scaled gradients: call backward, scaler.unscale_(optimizer) and "
                "scaler.step(optimizer) without a closure, as in the docstring of SAM"
            )
