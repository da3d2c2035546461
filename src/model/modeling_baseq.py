"""Runs a checkpoint that baseq quantized, from its own folder:

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

The arithmetic of the format (online Hadamard transforms, quant points, quantized keys and values, packed weights) is
simulated in floating point, on whatever device PyTorch has. Loaded with dtype=torch.float32 it computes what
`baseq eval` computes. Weights stay packed in the checkpoint and become dense when a layer is first used.
"""

import json
import math
from functools import lru_cache

import torch
from safetensors import safe_open
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import (ALL_ATTENTION_FUNCTIONS, apply_rotary_pos_emb,
                                                      eager_attention_forward)
from transformers.utils import cached_file

FORMAT_VERSION = 4

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
def normalised_factor(n, dtype, device):
    return (hadamard_factor(n) / math.sqrt(n)).to(device, dtype)


def hadamard_transform(x):
    """x H over the last dimension."""
    y, inner = x.float(), 1
    for order in reversed(hadamard_factors(x.shape[-1])):
        while order > 1:  # a power of two in parts of at most 64, the last ones first
            part = math.gcd(order, 64) if is_power_of_two(order) else order
            h = normalised_factor(part, y.dtype, y.device)
            y = torch.matmul(h.t(), y.reshape(-1, part, inner))
            inner, order = inner * part, order // part
    return y.reshape(x.shape).to(x.dtype)


# ---- grids


def unpack(packed, num_bits, columns):
    """int32 [rows, words] -> signed codes [rows, columns]: a dense stream of bits, least significant first."""
    position = torch.arange(columns, device=packed.device) * num_bits
    word, offset = position // 32, position % 32
    words = packed.long() & 0xFFFFFFFF
    following = words[:, (word + 1).clamp(max=words.shape[1] - 1)]
    codes = (words[:, word] >> offset | following << (32 - offset)) & (2**num_bits - 1)
    return codes - 2 ** (num_bits - 1)


class QuantPoint(nn.Module):
    """u = gain x - shift, then Q(u); see "Arithmetic" in the format's description. `spec` None: u itself."""

    def __init__(self, spec, features, has):
        super().__init__()
        self.spec = spec
        self.groups = features // spec["group_size"] if spec and spec["strategy"] == "group" else 1
        for name in ("gain", "shift"):
            self.register_buffer(name, torch.ones(features) if has(name) else None)
        self.register_buffer("clip", torch.ones(self.groups, 1) if has("clip") else None)

    def forward(self, x):
        u = x.float()
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
    """A linear with packed weights; `point` and `online` act on its input."""

    def __init__(self, out_features, in_features, spec, has, point=None, online=False, lora_rank=0):
        super().__init__()
        self.in_features, self.out_features, self.spec, self.online = in_features, out_features, spec, online
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
        self.dense = None
        rank = min(lora_rank, out_features, in_features)
        dtype = torch.int8 if has("lora_A_scale") else torch.float32
        self.register_buffer("lora_A", torch.zeros(rank, in_features, dtype=dtype) if rank else None)
        self.register_buffer("lora_B", torch.zeros(out_features, rank, dtype=dtype) if rank else None)
        self.register_buffer("lora_A_scale", torch.ones(rank, 1) if has("lora_A_scale") else None)
        self.register_buffer("lora_B_scale", torch.ones(1, rank) if has("lora_B_scale") else None)

    def dequantized(self):
        """float32 [out_features, in_features]: the codes' values and the correction of low rank."""
        codes = unpack(self.weight_packed, self.spec["num_bits"], self.in_features).float()
        scale = self.weight_scale.float()
        values = codes.reshape(self.out_features, scale.shape[1], -1)
        if not self.spec["symmetric"]:
            zero_point = unpack(self.weight_zero_point.t().contiguous(), self.spec["num_bits"], self.scale_rows)
            values = values - zero_point.t().unsqueeze(-1)
        weight = (values * scale.unsqueeze(-1)).reshape(codes.shape)
        if self.lora_A is None:
            return weight
        down, up = self.lora_A.float(), self.lora_B.float()
        if self.lora_A_scale is not None:
            down, up = down * self.lora_A_scale.float(), up * self.lora_B_scale.float()
        return weight + up @ down

    def forward(self, x):
        if self.online:
            x = hadamard_transform(x)
        if hasattr(self, "input_quant"):
            x = self.input_quant(x)
        weight = self.weight if self.spec is None else self.dense
        if weight is None or weight.device != x.device or weight.dtype != x.dtype:
            weight = (self.weight if self.spec is None else self.dequantized()).to(x.device, x.dtype)
            if self.spec is not None:
                self.dense = weight
        return nn.functional.linear(x, weight, None if self.bias is None else self.bias.to(x.dtype))


# ---- the model


class Attention(nn.Module):
    def __init__(self, config, layer_idx, make):
        super().__init__()
        self.config, self.layer_idx, self.is_causal = config, layer_idx, True
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling, self.attention_dropout = self.head_dim**-0.5, 0.0
        online = config.quantization_config["online_hadamard"]
        self.input_hadamard, self.query_key_hadamard = online["input"], online["query_key"]
        heads, kv = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.input_quant = make.point("self_attn.input_quant", config.hidden_size)
        self.k_cache_quant = make.point("self_attn.k_cache_quant", kv, cache=True)
        self.v_cache_quant = make.point("self_attn.v_cache_quant", kv, cache=True)
        self.q_proj = make.linear("self_attn.q_proj", heads, config.hidden_size)
        self.k_proj = make.linear("self_attn.k_proj", kv, config.hidden_size)
        self.v_proj = make.linear("self_attn.v_proj", kv, config.hidden_size)
        self.o_proj = make.linear("self_attn.o_proj", config.hidden_size, heads, online=online["o"])

    def forward(self, hidden_states, position_embeddings, attention_mask=None, past_key_values=None,
                cache_position=None, **kwargs):
        past_key_values = kwargs.pop("past_key_value", None) if past_key_values is None else past_key_values
        shape = hidden_states.shape[:-1]
        x = self.input_quant(hadamard_transform(hidden_states) if self.input_hadamard else hidden_states)
        query = self.q_proj(x).view(*shape, -1, self.head_dim).transpose(1, 2)
        key = self.k_proj(x).view(*shape, -1, self.head_dim).transpose(1, 2)
        value = self.v_cache_quant(self.v_proj(x)).view(*shape, -1, self.head_dim).transpose(1, 2)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if self.query_key_hadamard:
            query, key = hadamard_transform(query), hadamard_transform(key)
        key = self.k_cache_quant(key.transpose(1, 2).flatten(-2)).view(*shape, -1, self.head_dim).transpose(1, 2)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx, {"cache_position": cache_position})
        implementation = self.config._attn_implementation
        attend = eager_attention_forward if implementation == "eager" else ALL_ATTENTION_FUNCTIONS[implementation]
        output, weights = attend(self, query, key, value, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs)
        return self.o_proj(output.reshape(*shape, -1)), weights


class Mlp(nn.Module):
    def __init__(self, config, make):
        super().__init__()
        online = config.quantization_config["online_hadamard"]
        self.input_hadamard = online["input"]
        self.input_quant = make.point("mlp.input_quant", config.hidden_size)
        self.gate_proj = make.linear("mlp.gate_proj", config.intermediate_size, config.hidden_size)
        self.up_proj = make.linear("mlp.up_proj", config.intermediate_size, config.hidden_size)
        self.down_proj = make.linear("mlp.down_proj", config.hidden_size, config.intermediate_size,
                                     online=online["down"])

    def forward(self, x):
        x = self.input_quant(hadamard_transform(x) if self.input_hadamard else x)
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Maker:
    """Makes the modules of a block with the optional tensors that the checkpoint has."""

    def __init__(self, config):
        self.quantization, self.tensors = config.quantization_config, set(getattr(config, "baseq_tensors", ()))
        version = self.quantization["format_version"]
        if version != FORMAT_VERSION:
            raise ValueError(f"format_version {version} is not {FORMAT_VERSION}, which this file reads")

    def has(self, name):
        return lambda part: f"{name}.{part}" in self.tensors

    def point(self, name, features, cache=False):
        spec = self.quantization["kv_cache" if cache else "input_activations"]
        return QuantPoint(spec, features, self.has(name))

    def linear(self, name, out_features, in_features, online=False):
        point = None
        if name.endswith(("o_proj", "down_proj")):
            point = self.point(f"{name}.input_quant", in_features)
        return Linear(out_features, in_features, self.quantization["weights"], self.has(name), point, online,
                      self.quantization["lora_rank"])


class BaseqForCausalLM(LlamaForCausalLM):
    config_class = LlamaConfig

    def __init__(self, config):
        super().__init__(config)
        for index, layer in enumerate(self.model.layers):
            layer.self_attn = Attention(config, index, Maker(config))
            layer.mlp = Mlp(config, Maker(config))
        # Scales and corrections keep their precision in a model of half precision.
        self._keep_in_fp32_modules_strict = {"weight_scale", "lora_A_scale", "lora_B_scale", "clip", "gain", "shift",
                                             "bias"}

    @classmethod
    def from_pretrained(cls, path, *args, config=None, **kwargs):
        hub = {key: kwargs[key] for key in ("cache_dir", "revision", "token", "local_files_only", "subfolder",
                                            "force_download") if key in kwargs}
        config = LlamaConfig.from_pretrained(path, **hub) if config is None else config
        config.baseq_tensors = optional_tensors(path, hub)
        return super().from_pretrained(path, *args, config=config, **kwargs)


def optional_tensors(path, hub):
    """Names, within a block, of the tensors that a checkpoint may have and this one has. All blocks have the same."""
    index = cached_file(path, "model.safetensors.index.json", _raise_exceptions_for_missing_entries=False, **hub)
    names = {}
    files = [cached_file(path, "model.safetensors", **hub)] if index is None else []
    if index is not None:
        with open(index, encoding="utf-8") as file:
            shards = set(json.load(file)["weight_map"].values())
        files = [cached_file(path, shard, **hub) for shard in sorted(shards)]
    for file in files:
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():
                if name.startswith("model.layers."):
                    _, _, block, local = name.split(".", 3)
                    names.setdefault(local, set()).add(block)
    optional = ("bias", "clip", "gain", "shift", "lora_A_scale", "lora_B_scale")
    return sorted(name for name in names if name.rsplit(".", 1)[1] in optional)
