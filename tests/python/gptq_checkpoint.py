"""GPTQ and AWQ checkpoints read with NumPy by their published layouts, and with nothing of baseq."""

import numpy as np
import torch

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which output of eight is in the nibble


def along_rows(words: np.ndarray, bits: int) -> np.ndarray:
    """int32 [words, columns] -> unsigned numbers [rows, columns], as the kernels of AutoGPTQ shift them out."""
    words = words.view(np.uint32).astype(np.int64)
    if bits != 3:
        shifts = np.arange(0, 32, bits).reshape(1, -1, 1)
        return ((words[:, None, :] >> shifts) & (2**bits - 1)).reshape(-1, words.shape[1])
    # 32 numbers in three words; the eleventh and the twenty-second lie in two of them.
    a, b, c = words[0::3], words[1::3], words[2::3]
    numbers = [(a >> 3 * i) & 7 for i in range(10)]
    numbers += [(a >> 30) | ((b & 1) << 2)]
    numbers += [(b >> 3 * i + 1) & 7 for i in range(10)]
    numbers += [(b >> 31) | ((c & 3) << 1)]
    numbers += [(c >> 3 * i + 2) & 7 for i in range(10)]
    return np.stack(numbers, 1).reshape(-1, words.shape[1])


def awq_columns(words: np.ndarray) -> np.ndarray:
    """int32 [rows, words] -> unsigned numbers [rows, 8 * words]."""
    words = words.view(np.uint32)
    numbers = np.empty((*words.shape, 8), np.int64)
    for nibble, output in enumerate(AWQ_ORDER):
        numbers[..., output] = (words >> 4 * nibble) & 15
    return numbers.reshape(words.shape[0], -1)


def dequantize(tensors: dict[str, torch.Tensor], name: str, config: dict) -> np.ndarray:
    """float32 [out_features, in_features] of a linear by what the checkpoint's quantization_config says."""
    qweight, qzeros = (np.ascontiguousarray(tensors[f"{name}.{part}"].numpy()) for part in ("qweight", "qzeros"))
    scales = tensors[f"{name}.scales"].float().numpy()
    if config["quant_method"] == "awq":
        codes, zeros = awq_columns(qweight), awq_columns(qzeros)
        group_size = config["group_size"] if config["group_size"] > 0 else len(codes)
        groups = np.arange(len(codes)) // group_size
    else:
        codes = along_rows(qweight, config["bits"])
        zeros = along_rows(np.ascontiguousarray(qzeros.T), config["bits"]).T
        zeros = zeros + {"gptq": 1, "gptq_v2": 0}[config["checkpoint_format"]]
        groups = tensors[f"{name}.g_idx"].numpy()
    return ((codes - zeros[groups]).astype(np.float32) * scales[groups]).T
