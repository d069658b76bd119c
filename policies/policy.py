"""A model family's policy: its table, checked to claim every parameter exactly once, and its splits for a tp_size."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any, Literal

from policies.errors import UserError
from policies.heads import HeadShard, split_grains, split_heads
from policies.rules import Claim, Experts, HeadNumbers, Split, expand

Rows = Literal["patch", "merged", "token", "last"]


@dataclass(frozen=True)
class Attention:
    """The heads of one encoder's attention, before any cut."""

    q_heads: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class DecoderNames:
    """The modules of the text decoder by their published names, those of a layer without their stack: pre-norm layers
    of attention with rotary positions and of a gated MLP, around a residual.

    It is total: a module that is not named here, and does not hold named ones, is one that a decode step would leave
    out, so that the model is decoded by Transformers' own loop.
    attention, mlp: the modules that hold the others. q_norm, k_norm: RMS norms of each head before it is rotated.
    router, experts: in `mlp`, in place of gate, up, down and activation, of the layers that have them.
    unused: modules that some releases create and never call.
    """

    embedding: str
    rotary: str
    norm: str
    head: str
    attention_norm: str = "input_layernorm"
    attention: str = "self_attn"
    q: str = "self_attn.q_proj"
    q_norm: str | None = None
    k: str = "self_attn.k_proj"
    k_norm: str | None = None
    v: str = "self_attn.v_proj"
    o: str = "self_attn.o_proj"
    mlp_norm: str = "post_attention_layernorm"
    mlp: str = "mlp"
    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    activation: str = "mlp.act_fn"
    router: str | None = None
    experts: str | None = None
    unused: tuple[str, ...] = ()

    def computing(self) -> tuple[str, ...]:
        """The modules of a layer that compute something."""
        optional = tuple(name for name in (self.q_norm, self.k_norm, self.router, self.experts) if name)
        return (self.attention_norm, self.q, self.k, self.v, *optional, self.o, self.mlp_norm, self.gate, self.up,
                self.down, self.activation)


@dataclass(frozen=True)
class Geometry:
    """What config.json says, in one family's terms.

    sizes: every named dimension of the table, in elements.
    attention: "text" and "vision" -> heads, and "linear" where layers have a recurrence: there a head is a key head
    with its value heads. layers: stack ("model.layers") -> count, the text encoder's first. lists:
    other numbered modules -> count. kinds: stack -> the kind of each of its layers, where they differ (Claim.kind).
    context: longest sequence in tokens. merge_side: patches a side that make one token. windowed_layers: layers of the
    vision encoder that attend inside windows of `window_patches` patches, the others to whole frames. injected_layers:
    text layers, from the first, after each of which features of the vision encoder are added. experts_per_token: that
    the router chooses. assumed: keys that the file should state and does not -> the default that stands in.
    """

    sizes: Mapping[str, int]
    attention: Mapping[str, Attention]
    layers: Mapping[str, int]
    tied: bool
    context: int
    merge_side: int
    windowed_layers: int = 0
    window_patches: int = 0
    injected_layers: int = 0
    lists: Mapping[str, int] = field(default_factory=dict)
    kinds: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    experts_per_token: int = 0
    assumed: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @property
    def counts(self) -> Mapping[str, int]:
        """How many modules the `*` of a row stands for, by what is before it."""
        return {**self.layers, **self.lists}

    @property
    def patch_values(self) -> int:
        """Numbers in one patch: those of all channels, of as many frames and pixels as it covers."""
        return self.sizes["channels"] * self.sizes["frames"] * self.sizes["patch"] ** 2

    @property
    def text_stack(self) -> str:
        return next(iter(self.layers))


@dataclass(frozen=True)
class Encoder:
    """The vision encoder. Nothing in it looks from one image, or one frame of a video, at another.

    module, stack: its published name and that of its layers. heads: its key in Geometry.attention.
    patches, grid: arguments of its forward: [n, values], and int64 [media, 3], a row (t, h, w) standing for t frames of
    h x w patches, in order.
    features: the field that has the features, [tokens, `width`], where forward returns more than a tensor. injected:
    the field that has a list of more features alike, added after each of the first text layers; None where none are.
    """

    module: str
    stack: str
    heads: str
    patches: str
    grid: str
    features: str
    width: str
    injected: str | None = None


@dataclass(frozen=True)
class DeltaNet:
    """Layers whose attention is a gated delta rule: each value head has a state [key dim, value dim] that decays, and a
    convolution over tokens before it (Yang, Kautz, Hatamizadeh: Gated Delta Networks, 2024).

    module, kind: the layers' module. heads: its entry in Geometry.attention. qkv, beta, decay, norm: modules in it: the
    linear [q | k | v], those of the update's strength and of the decay, and the gated norm after the recurrence.
    convolution, log_decay, bias: its own parameters, by their names in the table.
    key, value, value_heads, width: named dimensions: of all key heads, all value heads, their number, and the tokens
    that the convolution sees.
    """

    module: str
    kind: str
    heads: str
    qkv: str
    beta: str
    decay: str
    norm: str
    convolution: str
    log_decay: str
    bias: str
    key: str
    value: str
    value_heads: str
    width: str


@dataclass(frozen=True)
class Policy:
    """One model family: what is sharded how. Data, but for `geometry`, which reads a config.json mapping.

    first_release: of Transformers that has `model_class`.
    head_axes: named dimension -> (entry of Geometry.attention, "q" or "kv"): dimensions that are cut by heads, each of
        them equally wide; other cut ones go by grains.
    renames: (newer prefix, published prefix): module and tensor names of newer releases, in order of application.
    media_tokens: keys of config.json with ids of tokens that stand for media: fed back they claim an image's place.
    ignored: patterns of tensors that files may have and that are not loaded: they are computed, or nothing uses them.
    tied: (parameter, the parameter it is tied to) where the config ties them.
    decoder: the text decoder's modules, for the decode loop; None where its steps are none of ours: `not_decoded`, why.
    delta_net: the layers with a recurrence in place of attention.
    dialects: words of other tools (policies.export) in which the table has been run by them.
    rows: (start of a module's name, what one row of its input is), the first that fits: "patch", "merged" (the patches
        that make one token), "token", or "last" (a sequence's last position). The first two are the vision encoder.
    """

    model_type: str
    model_class: str
    first_release: str
    table: tuple[Claim, ...]
    head_axes: Mapping[str, tuple[str, str]]
    head_numbers: tuple[HeadNumbers, ...]
    renames: tuple[tuple[str, str], ...]
    media_tokens: tuple[str, ...]
    ignored: tuple[str, ...]
    tied: tuple[str, str]
    decoder: DecoderNames | None
    rows: tuple[tuple[str, Rows], ...]
    encoder: Encoder
    geometry: Callable[[Mapping[str, Any]], Geometry]
    problems: Callable[[Geometry, int], list[str]]
    dialects: tuple[str, ...] = ()
    not_decoded: str = ""
    delta_net: DeltaNet | None = None

    def ignores(self, name: str) -> bool:
        """Whether a tensor of a file is not to be loaded."""
        return any(fnmatchcase(name, pattern) for pattern in self.ignored)

    def published(self, name: str) -> str:
        """The published name of a module or tensor that may carry a newer release's name."""
        for new, old in self.renames:
            if name.startswith(new):
                return old + name[len(new) :]
        return name

    def rows_of(self, module: str) -> Rows:
        """What one row of a module's input is. Raises UserError where the page does not say."""
        for start, unit in self.rows:
            if module.startswith(start):
                return unit
        raise UserError(f"policy {self.model_type}: no entry of rows says what {module!r} computes on; add one")

    def claims(self, geometry: Geometry) -> dict[str, Claim]:
        """Module name -> its claim, every layer spelled out. Raises UserError where two rows claim one module."""
        claimed: dict[str, Claim] = {}
        for claim in self.table:
            for module in self.modules(claim, geometry):
                if module in claimed:
                    raise UserError(f"policy {self.model_type}: rows {claimed[module].module!r} and {claim.module!r} "
                                    f"both claim {module!r}; leave it to one of them")
                claimed[module] = claim
        return claimed

    def modules(self, claim: Claim | HeadNumbers | DeltaNet, geometry: Geometry) -> list[str]:
        """The modules that a row of the page stands for, in order, all cut alike; none where no layer is of its kind.
        """
        modules = expand(claim.module, geometry.counts)
        if claim.kind is None:
            return modules
        kinds = geometry.kinds[claim.module.split(".*", 1)[0]]
        return [module for module, kind in zip(modules, kinds, strict=True) if kind == claim.kind]

    def experts_by(self, by: Literal["tensor", "expert"]) -> Policy:
        """This policy, its experts cut in width, or dealt whole (rules.Experts)."""
        table = (replace(c, rule=replace(c.rule, by=by)) if isinstance(c.rule, Experts) else c for c in self.table)
        return replace(self, table=tuple(table))

    def inventory(self, geometry: Geometry) -> dict[str, tuple[int, ...]]:
        """Parameter name -> full shape: all the table claims, the tied copy included."""
        return {
            f"{module}.{suffix}": tuple(geometry.sizes[d] for d in dims)
            for module, claim in self.claims(geometry).items()
            for suffix, dims in claim.parameters().items()
        }

    def check_claims(self, parameters: Iterable[str], geometry: Geometry) -> None:
        """Each parameter (published name) has one row, each row a parameter. Raises UserError naming those without."""
        have, claimed = set(parameters), self.inventory(geometry)
        optional = {self.tied[0]} if geometry.tied else set()
        problems = [f"no rule claims {n!r}: add a row to the table" for n in sorted(have - claimed.keys())]
        problems += [f"the rule for {n!r} claims nothing: the model has no such parameter"
                     for n in sorted(claimed.keys() - have - optional)]
        if problems:
            raise UserError(f"policy {self.model_type} does not fit the model:\n  " + "\n  ".join(problems))

    def heads(self, geometry: Geometry, tp_size: int) -> dict[str, tuple[HeadShard, ...]]:
        """Encoder -> every rank's heads."""
        return {t: split_heads(a.q_heads, a.kv_heads, a.head_dim, tp_size) for t, a in geometry.attention.items()}

    def splits(self, geometry: Geometry, tp_size: int) -> dict[str, Split]:
        """Named dimension -> who owns what, for every dimension some row cuts."""
        heads = self.heads(geometry, tp_size)
        axes = sorted(set().union(*(claim.axes() for claim in self.table)))
        return {a: self._split(a, geometry, heads) or split_grains(geometry.sizes[a], tp_size) for a in axes}

    def _split(self, axis: str, geometry: Geometry, heads: Mapping[str, tuple[HeadShard, ...]]) -> Split | None:
        if axis not in self.head_axes:
            return None
        encoder, kind = self.head_axes[axis]
        rows = self.rows_of_a_head(axis, geometry)
        owned = [shard.q if kind == "q" else shard.kv for shard in heads[encoder]]
        return Split(geometry.sizes[axis], tuple((a * rows, b * rows) for a, b in owned))

    def rows_of_a_head(self, axis: str, geometry: Geometry) -> int:
        """Elements that one head has of a dimension that is cut by heads."""
        encoder, kind = self.head_axes[axis]
        heads = geometry.attention[encoder]
        return geometry.sizes[axis] // (heads.q_heads if kind == "q" else heads.kv_heads)
