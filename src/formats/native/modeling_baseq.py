"""Runs a checkpoint that baseq quantized, from its own folder:

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

The arithmetic of the format (online transforms, quant points, quantized keys and values, packed weights) is simulated
in floating point, on whatever device PyTorch has. Loaded with dtype=torch.float32 it computes what `baseq eval`
computes. A weight is unpacked when its layer is first used, and the packed one is let go of; with keep_packed=True it
stays packed and is unpacked in every forward pass.
"""

import inspect
import json
import math
from functools import lru_cache

import torch
import transformers
from safetensors import safe_open
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import (ALL_ATTENTION_FUNCTIONS, LlamaAttention, LlamaRMSNorm,
                                                      apply_rotary_pos_emb, eager_attention_forward)
from transformers.utils import cached_file

FORMAT_VERSIONS = (3, 4, 5, 6, 7)
CHUNK = 1 << 20  # weights unpacked at a time, for each takes some 12 bytes meanwhile
# The tensors of each kind of factor of an online transform, those of inverses apart: these end in _inverse and exist
# where something is multiplied by an inverse that is not the transpose.
FACTORS = {"scale": ("scale",), "hadamard": ("hadamard",), "matrix": ("matrix",),
           "kronecker": ("kronecker_left", "kronecker_right"), "permutation": ("permutation",)}
INTEGERS = {"hadamard", "permutation"}


def with_inverses(names):
    return {*names, *(f"{name}_inverse" for name in names)}


# What stays float32 in a model of half precision: vectors, norms, whose weights hold gains, transforms and RoPE's
# frequencies.
FLOAT32 = {"weight_scale", "lora_A_scale", "lora_B_scale", "clip", "gain", "shift", "bias", "input_layernorm",
           "post_attention_layernorm", "norm", "inv_freq", "original_inv_freq"}
FLOAT32 |= {name for names in FACTORS.values() for name in with_inverses(names)} - INTEGERS
# The points before which versions 3 and 4 have a Hadamard transform, by the flags that say so.
POINTS_OF_FLAGS = {"input": ("self_attn.input_quant", "mlp.input_quant"), "query_key": ("self_attn.k_cache_quant",),
                   "o": ("self_attn.o_proj.input_quant",), "down": ("mlp.down_proj.input_quant",)}

# ---- Hadamard matrices: Sylvester, Paley I and II, Williamson, and products of these

MAX_FACTOR = 2048
# First rows of the symmetric circulants A, B, C and D with A^2 + B^2 + C^2 + D^2 = 4 w I.
WILLIAMSON = {
    92: "++-+-+--+++--+++--+-+-+ "
        "+----+++++-++-+++++---- "
        "+++-++-++--++--++-++-++ "
        "++-----+-+-++-+-+-----+",
    116: "+--+-+-+++++++--+++++++-+-+-- "
         "+--++----+-+-++++-+-+----++-- "
         "+--+++--++-+--++--+-++--+++-- "
         "+++-+++-+----++++----+-+++-++",
    172: "+-+-++--++-+++++---++--++---+++++-++--++-+- "
         "+--+-+--++++-+--+++-++++-+++--+-++++--+-+-- "
         "+++--++++-+-+++-++--------++-+++-+-++++--++ "
         "+-+------++++-+-++--+--+--++-+-++++------+-",
}


def prime_power(q):
    """(p, e) with q = p^e, or None."""
    p = next((d for d in range(2, math.isqrt(max(q, 0)) + 1) if q % d == 0), q)
    e = 0
    while q > 1 and q % p == 0:
        q, e = q // p, e + 1
    return (p, e) if q == 1 and e > 0 else None


def is_power_of_two(n):
    return n & (n - 1) == 0


def has_paley_one(n):
    return n % 4 == 0 and prime_power(n - 1) is not None


def has_paley_two(n):
    return n % 8 == 4 and prime_power(n // 2 - 1) is not None


def jacobsthal(q):
    """Q[i, j] = chi(a_i - a_j) over GF(q), chi the quadratic character; an element is the number of its digits."""
    p, e = prime_power(q)

    def digits(value, count):
        return [value // p**i % p for i in range(count)]

    def remainder(dividend, divisor):
        dividend = list(dividend)
        while len(dividend) >= len(divisor):
            lead, shift = dividend[-1], len(dividend) - len(divisor)
            for i, coefficient in enumerate(divisor):
                dividend[shift + i] = (dividend[shift + i] - lead * coefficient) % p
            dividend.pop()
        return dividend

    def irreducible(f):
        return all(any(remainder(f, digits(low, d) + [1])) for d in range(1, (len(f) - 1) // 2 + 1)
                   for low in range(p**d))

    modulus = next(f for f in (digits(low, e) + [1] for low in range(q)) if irreducible(f))
    chi = torch.full((q,), -1.0, dtype=torch.float64)
    chi[0] = 0
    for a in range(1, q):
        square = [0] * (2 * e - 1)
        for i, x in enumerate(digits(a, e)):
            for j, y in enumerate(digits(a, e)):
                square[i + j] = (square[i + j] + x * y) % p
        chi[sum(c * p**i for i, c in enumerate(remainder(square, modulus)))] = 1
    elements = torch.tensor([digits(a, e) for a in range(q)])
    differences = (elements.unsqueeze(1) - elements.unsqueeze(0)) % p
    return chi[(differences * torch.tensor([p**i for i in range(e)])).sum(-1)]


def bordered(q, sign):
    matrix = torch.ones(len(q) + 1, len(q) + 1, dtype=torch.float64)
    matrix[1:, 0] = sign
    matrix[0, 0] = 0
    matrix[1:, 1:] = q
    return matrix


def williamson(n):
    w = n // 4
    shift = (torch.arange(w) - torch.arange(w).unsqueeze(1)) % w
    a, b, c, d = (torch.tensor([1.0 if s == "+" else -1.0 for s in row], dtype=torch.float64)[shift]
                  for row in WILLIAMSON[n].split())
    return torch.cat([torch.cat(row, 1) for row in ((a, b, c, d), (-b, a, -d, c), (-c, d, a, -b), (-d, -c, b, a))])


@lru_cache(maxsize=None)
def hadamard_factor(n):
    """Entries of +1 and -1, float64 [n, n]."""
    if is_power_of_two(n):
        matrix = torch.ones(1, 1, dtype=torch.float64)
        while len(matrix) < n:
            matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), matrix)
        return matrix
    if has_paley_one(n):
        return bordered(jacobsthal(n - 1), -1) + torch.eye(n, dtype=torch.float64)
    if has_paley_two(n):
        corner = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        diagonal = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        return torch.kron(bordered(jacobsthal(n // 2 - 1), 1), corner) + torch.kron(
            torch.eye(n // 2, dtype=torch.float64), diagonal)
    return williamson(n)


@lru_cache(maxsize=None)
def decomposition(n, largest=MAX_FACTOR):
    """The cheapest (cost, factors) with the power of two last and the others before it in descending order, or None."""
    best = (60 if n < 16 else 0, (n,)) if is_power_of_two(n) else None
    for m in range(12, min(n, largest) + 1, 4):
        if n % m or is_power_of_two(m) or not (has_paley_one(m) or has_paley_two(m) or m in WILLIAMSON):
            continue
        rest = decomposition(n // m, m)
        if rest and (best is None or rest[0] + m + 30 < best[0]):
            best = (rest[0] + m + 30, (m, *rest[1]))
    return best


@lru_cache(maxsize=None)
def hadamard_factors(n):
    """The factors of the blocks of the largest block-diagonal Hadamard matrix of size n."""
    return next(found[1] for found in (decomposition(n // k) for k in range(1, n + 1) if n % k == 0) if found)


@lru_cache(maxsize=None)
@torch.inference_mode(False)  # a tensor made in inference mode could not be kept for a later backward pass
def normalised_factor(n, dtype, device):
    return (hadamard_factor(n) / math.sqrt(n)).to(device, dtype)


def widened(x):
    return x if x.dtype == torch.float64 else x.float()


def hadamard_transform(x):
    """x H over the last dimension."""
    y, inner = widened(x), 1
    for order in reversed(hadamard_factors(x.shape[-1])):
        while order > 1:  # a power of two in parts of at most 64, the last ones first
            part = math.gcd(order, 64) if is_power_of_two(order) else order
            h = normalised_factor(part, y.dtype, y.device)
            # One product for the innermost part: a batch of products with vectors would take 10 times as long.
            y = y.reshape(-1, part) @ h if inner == 1 else h.t() @ y.reshape(-1, part, inner)
            inner, order = inner * part, order // part
    return y.reshape(x.shape).to(x.dtype)


# ---- online transforms


class Factor(nn.Module):
    """An invertible matrix T, x -> x T over the last dimension; `tensors` gives the shapes of its tensors by name, of a
    Hadamard transform (order, blocks) themselves. Without `stored` it is no tensor of the checkpoint."""

    def __init__(self, tensors, stored=True):
        super().__init__()
        self.kind = next((kind for kind, names in FACTORS.items() if set(names) <= set(tensors) <= with_inverses(names)),
                         None)
        if self.kind is None:
            raise ValueError(f"{', '.join(sorted(tensors))}: no factor of a transform that modeling_baseq.py knows")
        self.order = tensors["hadamard"][0] if self.kind == "hadamard" else 0
        for name, shape in tensors.items() if stored else ():
            tensor = torch.tensor(shape) if name == "hadamard" else torch.zeros(shape)
            self.register_buffer(name, tensor.long() if name in INTEGERS else tensor)

    def part(self, name, x, inverse_transpose):
        """A tensor of T or T^-T, which are the same where no inverse is stored."""
        tensor, inverse = getattr(self, name), getattr(self, f"{name}_inverse", None)
        if inverse_transpose and inverse is not None:
            tensor = inverse if inverse.dim() == 1 else inverse.mT
        return tensor.to(x.dtype)

    def forward(self, x, inverse_transpose=False):
        if self.kind == "hadamard":
            return hadamard_transform(x.unflatten(-1, (-1, self.order))).flatten(-2)
        if self.kind == "permutation":
            return x[..., self.permutation]
        parts = [self.part(name, x, inverse_transpose) for name in FACTORS[self.kind]]
        if self.kind == "scale":
            return x * parts[0]
        if self.kind == "kronecker":
            left, right = parts
            return (left.t() @ (x.reshape(-1, len(left), len(right)) @ right)).reshape(x.shape)
        # One product for each matrix: a batch of products with vectors would take 10 times as long.
        columns = x.reshape(-1, *parts[0].shape[:2]).transpose(0, 1)
        return (columns @ parts[0]).transpose(0, 1).reshape(x.shape)


def apply_chain(chain, x, inverse_transpose=False):
    """x T_1 T_2 ..., or x T_1^-T T_2^-T ..., on the last dimension."""
    if not chain:
        return x
    y = widened(x)
    for factor in chain:
        y = factor(y, inverse_transpose)
    return y.to(x.dtype)


# ---- grids


def unpack(packed, num_bits, columns):
    """int32 [rows, words] -> signed codes, int32 [rows, columns]: a dense stream of bits, least significant first."""
    period = 32 // math.gcd(num_bits, 32)  # codes until one starts at the start of a word again
    words = period * num_bits // 32
    packed = nn.functional.pad(packed, (0, -packed.shape[1] % words)).unflatten(1, (-1, words))
    codes = torch.empty(*packed.shape[:2], period, dtype=torch.int32, device=packed.device)
    for i in range(period):
        word, offset = divmod(i * num_bits, 32)
        held = min(num_bits, 32 - offset)  # bits of the code in this word
        code = packed[..., word] >> offset & 2**held - 1
        if held < num_bits:
            code |= packed[..., word + 1] << held & 2**num_bits - 1
        codes[..., i] = code - 2 ** (num_bits - 1)
    return codes.flatten(1)[:, :columns]


class QuantPoint(nn.Module):
    """u = gain x T - shift, then Q(u); see "Arithmetic" in the format's description. `spec` None: u itself. T is the
    chain `transform` on every block of `width` features."""

    def __init__(self, spec, features, has, transform=(), width=None):
        super().__init__()
        self.spec, self.width = spec, width or features
        self.transform = nn.ModuleList(transform)
        self.groups = features // spec["group_size"] if spec and spec["strategy"] == "group" else 1
        for name in ("gain", "shift"):
            self.register_buffer(name, torch.ones(features) if has(name) else None)
        self.register_buffer("clip", torch.ones(self.groups, 1) if has("clip") else None)

    def forward(self, x):
        if self.transform:
            x = apply_chain(self.transform, x.unflatten(-1, (-1, self.width))).flatten(-2)
        if self.spec is None and self.gain is None and self.shift is None:
            return x
        u = widened(x)
        if self.gain is not None:
            u = u * self.gain.float()
        if self.shift is not None:
            u = u - self.shift.float()
        return (self.quantize(u) if self.spec else u).to(x.dtype)

    def quantize(self, u):
        steps = 2 ** self.spec["num_bits"] - 1
        grouped = u.unflatten(-1, (self.groups, -1))
        high, low = grouped.amax(-1, keepdim=True), grouped.amin(-1, keepdim=True)
        clip = torch.ones(1, 1, device=u.device) if self.clip is None else self.clip.float()
        if self.spec["symmetric"]:
            scale = (torch.maximum(clip * high, -(clip * low)) / (steps / 2)).clamp(min=1e-12)
            codes = (grouped / scale).round().clamp(-(steps + 1) // 2, steps // 2)
            return (codes * scale).flatten(-2)
        middle, half = (high + low) / 2, (high - low) / 2
        base = middle - clip * half
        scale = ((middle + clip * half - base) / steps).clamp(min=1e-5)
        codes = ((grouped - base) / scale).round().clamp(0, steps)
        return (base + codes * scale).flatten(-2)


class Linear(nn.Module):
    """A linear with packed weights; `point` acts on its input.

    With `stored`, the packed weight in the checkpoint's file, `dense` takes the place of `weight_packed` at the first
    use; without it the weight stays packed and is unpacked at each use. Memory never holds both.
    """

    def __init__(self, out_features, in_features, spec, has, point=None, lora_rank=0):
        super().__init__()
        self.in_features, self.out_features, self.spec = in_features, out_features, spec
        if point is not None:
            self.input_quant = point
        self.register_buffer("bias", torch.zeros(out_features) if has("bias") else None)
        if spec is None:
            self.weight = nn.Parameter(torch.empty(out_features, in_features), requires_grad=False)
            return
        one = spec["strategy"] == "tensor"
        groups = in_features // spec["group_size"] if spec["strategy"] == "group" else 1
        self.scale_rows = 1 if one else out_features

        def words(codes):
            return math.ceil(codes * spec["num_bits"] / 32)

        self.register_buffer("weight_packed", torch.zeros(out_features, words(in_features), dtype=torch.int32))
        self.register_buffer("weight_scale", torch.ones(self.scale_rows, groups))
        self.register_buffer("weight_shape", torch.tensor([out_features, in_features]))
        if not spec["symmetric"]:
            self.register_buffer("weight_zero_point",
                                 torch.zeros(words(self.scale_rows), groups, dtype=torch.int32))
        self.dense = self.stored = None
        rank = min(lora_rank, out_features, in_features)
        dtype = torch.int8 if has("lora_A_scale") else torch.float32
        self.register_buffer("lora_A", torch.zeros(rank, in_features, dtype=dtype) if rank else None)
        self.register_buffer("lora_B", torch.zeros(out_features, rank, dtype=dtype) if rank else None)
        self.register_buffer("lora_A_scale", torch.ones(rank, 1) if has("lora_A_scale") else None)
        self.register_buffer("lora_B_scale", torch.ones(1, rank) if has("lora_B_scale") else None)

    def dequantized(self, dtype, device):
        """[out_features, in_features]: the codes' values and the correction of low rank, computed in float32."""
        packed = self.stored if self.weight_packed is None else self.weight_packed
        scale, zero_point = self.weight_scale.to(device).float(), None
        if not self.spec["symmetric"]:
            by_group = self.weight_zero_point.to(device).t()
            zero_point = unpack(by_group, self.spec["num_bits"], self.scale_rows).t()
            zero_point = zero_point.unsqueeze(-1).expand(self.out_features, -1, -1)
        up = None
        if self.lora_A is not None:
            down, up = self.lora_A.to(device).float(), self.lora_B.to(device).float()
            if self.lora_A_scale is not None:
                down, up = down * self.lora_A_scale.to(device).float(), up * self.lora_B_scale.to(device).float()
        scale = scale.unsqueeze(-1).expand(self.out_features, -1, -1)
        weight = torch.empty(self.out_features, self.in_features, dtype=dtype, device=device)
        step = max(1, CHUNK // self.in_features)
        for first in range(0, self.out_features, step):
            rows = slice(first, first + step)
            values = unpack(packed[rows].to(device), self.spec["num_bits"], self.in_features).float()
            values = values.unflatten(1, (scale.shape[1], -1))
            if zero_point is not None:
                values -= zero_point[rows]
            values = values.mul_(scale[rows]).flatten(1)
            weight[rows] = values if up is None else values + up[rows] @ down
        return weight

    def weight_for(self, x):
        if self.spec is None:
            return self.weight.to(x.device, x.dtype)
        if self.dense is not None and self.dense.dtype == x.dtype:
            return self.dense.to(x.device)
        # What is kept serves later calls: one may need gradients, one may not be in this one's autocast.
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            weight = self.dequantized(x.dtype, x.device)
        if self.stored is not None:
            self.dense, self.weight_packed = weight, None
        return weight

    def forward(self, x):
        if hasattr(self, "input_quant"):
            x = self.input_quant(x)
        return nn.functional.linear(x, self.weight_for(x), None if self.bias is None else self.bias.to(x.dtype))

    def _apply(self, fn, *args, **kwargs):
        if self.spec is not None:
            self.dense = None  # the next use makes it anew, where and as the model is now
        return super()._apply(fn, *args, **kwargs)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.spec is not None and self.weight_packed is None:
            destination[prefix + "weight_packed"] = self.stored

    def _load_from_state_dict(self, state_dict, prefix, *args):
        if self.spec is not None and any(prefix + name in state_dict for name in self._buffers):
            self.dense = None
            if prefix + "weight_packed" in state_dict:
                if self.weight_packed is None:
                    self.weight_packed = torch.empty_like(self.stored, device=self.weight_scale.device)
                self.stored = None
        super()._load_from_state_dict(state_dict, prefix, *args)


class Embedding(Linear):
    """A table with packed rows, in the dtype of the model."""

    def __init__(self, rows, features, spec):
        super().__init__(rows, features, spec, lambda part: False)
        self.register_buffer("like", torch.empty(0), persistent=False)

    def forward(self, ids):
        return nn.functional.embedding(ids, self.weight_for(self.like))


class TiedHead(nn.Module):
    """The head that is a quantized embedding, which has the tensors."""

    def __init__(self, embedding):
        super().__init__()
        self.embedding = [embedding]  # in a list, which makes it no module of this one

    def forward(self, x):
        return nn.functional.linear(x, self.embedding[0].weight_for(x))


class Norm(LlamaRMSNorm):
    """Its weight is float32 whatever the dtype of x."""

    def forward(self, x):
        return super().forward(x.float()).to(x.dtype)


# ---- the model


def is_cache(value):
    return hasattr(value, "get_seq_length")


# The name of the attention's cache in this transformers; it has changed twice.
CACHE_NAMES = {"cache", "past_key_values", "past_key_value"} & set(inspect.signature(LlamaAttention.forward).parameters)


def take_cache(kwargs):
    """Removes the cache from an attention's keyword arguments and returns it; should its name change again, too."""
    found = [kwargs.pop(name) for name in list(kwargs) if name in CACHE_NAMES or is_cache(kwargs[name])]
    return next((cache for cache in found if cache is not None), None)


def refuse_lost_cache(model, _, output):
    """A forward hook of the decoder. With a cache that stays empty generate() would see the last token only."""
    asked = any(is_cache(value) for value in (output.values() if hasattr(output, "values") else output))
    if asked and not model.layers[0].self_attn.has_cache and not (model.training and model.gradient_checkpointing):
        raise RuntimeError(
            f"modeling_baseq.py: the cache of keys and values of transformers {transformers.__version__} does not reach "
            "the attention; pass use_cache=False, or let a newer baseq replace this file: baseq update CHECKPOINT")


class Attention(nn.Module):
    def __init__(self, config, layer_idx, make):
        super().__init__()
        self.config, self.layer_idx, self.is_causal, self.has_cache = config, layer_idx, True, False
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling, self.attention_dropout = self.head_dim**-0.5, 0.0
        heads, kv = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.input_quant = make.point("self_attn.input_quant", config.hidden_size)
        self.k_cache_quant = make.point("self_attn.k_cache_quant", kv, width=self.head_dim, cache=True)
        self.v_cache_quant = make.point("self_attn.v_cache_quant", kv, cache=True)
        self.q_proj = make.linear("self_attn.q_proj", heads, config.hidden_size)
        self.k_proj = make.linear("self_attn.k_proj", kv, config.hidden_size)
        self.v_proj = make.linear("self_attn.v_proj", kv, config.hidden_size)
        self.o_proj = make.linear("self_attn.o_proj", config.hidden_size, heads)

    def forward(self, hidden_states, position_embeddings, attention_mask=None, **kwargs):
        cache = take_cache(kwargs)
        self.has_cache = cache is not None
        shape = hidden_states.shape[:-1]
        x = self.input_quant(hidden_states)
        query = self.q_proj(x).view(*shape, -1, self.head_dim).transpose(1, 2)
        key = self.k_proj(x).view(*shape, -1, self.head_dim).transpose(1, 2)
        value = self.v_cache_quant(self.v_proj(x)).view(*shape, -1, self.head_dim).transpose(1, 2)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        query = apply_chain(self.k_cache_quant.transform, query, inverse_transpose=True)
        key = self.k_cache_quant(key.transpose(1, 2).flatten(-2)).view(*shape, -1, self.head_dim).transpose(1, 2)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx, kwargs)
        kwargs.pop("cache_position", None)  # of transformers 4, for the cache only
        implementation = self.config._attn_implementation
        attend = eager_attention_forward if implementation == "eager" else ALL_ATTENTION_FUNCTIONS[implementation]
        output, weights = attend(self, query, key, value, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs)
        return self.o_proj(output.reshape(*shape, -1)), weights


class Mlp(nn.Module):
    def __init__(self, config, make):
        super().__init__()
        self.input_quant = make.point("mlp.input_quant", config.hidden_size)
        self.gate_proj = make.linear("mlp.gate_proj", config.intermediate_size, config.hidden_size)
        self.up_proj = make.linear("mlp.up_proj", config.intermediate_size, config.hidden_size)
        self.down_proj = make.linear("mlp.down_proj", config.hidden_size, config.intermediate_size)

    def forward(self, x):
        x = self.input_quant(x)
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Maker:
    """Makes the modules of block `index` with the optional tensors that the checkpoint has."""

    def __init__(self, config, index):
        self.index, self.quantization = index, config.quantization_config
        tensors = getattr(config, "baseq_tensors", {})
        self.tensors = {name.partition(".")[2]: shape for name, shape in tensors.items()
                        if name.startswith(f"{index}.")}
        version = self.quantization["format_version"]
        if version not in FORMAT_VERSIONS:
            known = ", ".join(map(str, FORMAT_VERSIONS))
            raise ValueError(f"format_version {version} of the checkpoint is unknown to modeling_baseq.py, which reads "
                             f"{known}")
        if self.quantization.get("runtime_smooth"):
            raise ValueError("runtime_smooth: modeling_baseq.py does not smooth activations at run time")

    def has(self, name):
        return lambda part: f"{name}.{part}" in self.tensors

    def transform(self, point, width):
        """The chain of factors before a quant point."""
        flags = self.quantization.get("online_hadamard", {})  # of versions 3 and 4, which store no factors
        if any(flags.get(flag) and point in points for flag, points in POINTS_OF_FLAGS.items()):
            return [Factor({"hadamard": (width, 1)}, stored=False)]
        found, prefix = {}, f"{point}.transform."
        for name, shape in self.tensors.items():
            if name.startswith(prefix):
                position, _, tensor = name.removeprefix(prefix).partition(".")
                found.setdefault(int(position), {})[tensor] = shape
        if sorted(found) != list(range(len(found))):
            raise ValueError(f"{prefix}*: factors {sorted(found)} of the chain are there, and others before them not")
        return [Factor(found[position]) for position in range(len(found))]

    def point(self, name, features, width=None, cache=False):
        spec = self.quantization["kv_cache" if cache else "input_activations"]
        return QuantPoint(spec, features, self.has(name), self.transform(name, width or features), width)

    def linear(self, name, out_features, in_features):
        point = None
        if name.endswith(("o_proj", "down_proj")):
            point = self.point(f"{name}.input_quant", in_features)
        overrides = self.quantization.get("overrides") or {}  # from version 7 on
        spec = overrides.get(f"model.layers.{self.index}.{name}", self.quantization["weights"])
        return Linear(out_features, in_features, spec, self.has(name), point, self.quantization["lora_rank"])


class BaseqForCausalLM(LlamaForCausalLM):
    config_class = LlamaConfig
    _auto_class = "AutoModelForCausalLM"  # so that save_pretrained() copies this file with every transformers

    def __init__(self, config):
        super().__init__(config)
        for index, layer in enumerate(self.model.layers):
            layer.self_attn = Attention(config, index, Maker(config, index))
            layer.mlp = Mlp(config, Maker(config, index))
            layer.input_layernorm = Norm(config.hidden_size, eps=config.rms_norm_eps)
            layer.post_attention_layernorm = Norm(config.hidden_size, eps=config.rms_norm_eps)
        self.model.norm = Norm(config.hidden_size, eps=config.rms_norm_eps)
        self.quantize_tables(config)
        self.model.register_forward_hook(refuse_lost_cache)
        self._keep_in_fp32_modules_strict = set(FLOAT32)

    def quantize_tables(self, config):
        """Head and embedding where the checkpoint has codes of them, from version 6 on."""
        head, embedding = (config.quantization_config.get(name) for name in ("head", "embedding"))
        sizes = config.vocab_size, config.hidden_size
        if embedding:
            self.model.embed_tokens = Embedding(*sizes, embedding)
        if head and config.tie_word_embeddings:
            self.lm_head = TiedHead(self.model.embed_tokens)
            self.all_tied_weights_keys = {}  # of transformers 5, which has nothing to tie
        elif head:
            self.lm_head = Linear(*sizes, head, lambda part: False)

    def tie_weights(self, *args, **kwargs):
        if not isinstance(self.lm_head, TiedHead):
            super().tie_weights(*args, **kwargs)

    def _apply(self, fn, *args, **kwargs):
        """`.half()`, `.to(torch.bfloat16)` and their like only move what stays float32."""
        named = (*self.named_parameters(), *self.named_buffers())
        kept = {id(tensor) for name, tensor in named if FLOAT32 & set(name.split("."))}

        def convert(tensor):
            converted = fn(tensor)
            return tensor.to(converted.device) if id(tensor) in kept and converted.dtype != tensor.dtype else converted

        return super()._apply(convert, *args, **kwargs)

    @classmethod
    def from_pretrained(cls, path, *args, config=None, keep_packed=False, **kwargs):
        hub = {key: kwargs[key] for key in ("cache_dir", "revision", "token", "local_files_only", "subfolder",
                                            "force_download") if key in kwargs}
        config = LlamaConfig.from_pretrained(path, **hub) if config is None else config
        optional, packed = read_checkpoint(path, hub)
        config.baseq_tensors = optional
        loaded = super().from_pretrained(path, *args, config=config, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        vars(model.config).pop("baseq_tensors", None)
        for name, module in model.named_modules():
            if not keep_packed and isinstance(module, Linear):
                module.stored = packed.get(f"{name}.weight_packed")
        return loaded


def read_checkpoint(path, hub):
    """Shapes of the tensors that a checkpoint may have and this one has, by names such as "0.mlp.up_proj.bias", and of
    Hadamard transforms their values; and the packed weights by name, mapped from the files: they take no memory until
    something reads them."""
    index = cached_file(path, "model.safetensors.index.json", _raise_exceptions_for_missing_entries=False, **hub)
    files = [cached_file(path, "model.safetensors", **hub)] if index is None else []
    if index is not None:
        with open(index, encoding="utf-8") as file:
            shards = set(json.load(file)["weight_map"].values())
        files = [cached_file(path, shard, **hub) for shard in sorted(shards)]
    optional, packed, blocks = {}, {}, "model.layers."
    kinds = ("bias", "clip", "gain", "shift", "lora_A_scale", "lora_B_scale")
    for file in files:
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():
                kind = name.rpartition(".")[2]
                if name.startswith(blocks) and (kind in kinds or ".transform." in name):
                    sizes = tensors.get_tensor(name).tolist() if kind == "hadamard" else None
                    optional[name.removeprefix(blocks)] = sizes or tensors.get_slice(name).get_shape()
                elif kind == "weight_packed":
                    packed[name] = tensors.get_tensor(name)
    return optional, packed
