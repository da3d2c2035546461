#!/usr/bin/env python3
"""Measures baseq and llama.cpp side by side on one model and prints a table in Markdown.

    python scripts/compare_llama_cpp.py MODEL [--quantized NAME=DIRECTORY[:OPTION ...] ...] [--threads 1] [--work DIRECTORY]

    python scripts/compare_llama_cpp.py runs/SmolLM2-135M-Instruct --quantized w4a4kv4=runs/baseq-plus-w4a4kv4 \\
        --quantized "w4 a15=runs/gptq-w4a16-g64" --quantized "w4 a8=runs/gptq-w4a16-g64:--activation-bits 8"

llama.cpp is compiled for this very processor, with every instruction set that it has a kernel for, from the sources in the
package llama-cpp-python (MIT): its wheels contain no AVX-512. MODEL, in full precision, becomes GGUF files by `baseq
export`, F16, and by llama.cpp's own llama-quantize, Q4_0. All measurements run in turn, several rounds, so that what else
the machine does hits all of them; the best of each counts, for both programs alike.

Needs cmake, a C++ compiler and some six minutes of one core for the first run; the build stays in the work directory.
"""
import argparse
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BASEQ = os.environ.get("BASEQ_BINARY", str(ROOT / "build" / "baseq"))
PACKAGE = "llama-cpp-python==0.3.36"
PREFILL = 512
DEPTHS = [1, 512, 960]
TOKENS = 32


def run(*command, **options) -> str:
    done = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, text=True, check=False, **options)
    if done.returncode != 0:
        sys.exit(f"compare_llama_cpp: {' '.join(map(str, command))} failed")
    return done.stdout


def llama_cpp(work: Path, jobs: int) -> Path:
    """The folder with llama-bench and llama-quantize, compiled here."""
    folder = work / "llama.cpp"
    programs = folder / "build" / "bin"
    if (programs / "llama-bench").exists() and (programs / "llama-quantize").exists():
        return programs
    if not list(work.glob("llama_cpp_python-*.tar.gz")):
        run(sys.executable, "-m", "pip", "download", "--quiet", "--no-binary", "llama-cpp-python", "--no-deps", "--dest", work, PACKAGE)
    (archive,) = work.glob("llama_cpp_python-*.tar.gz")
    if not folder.exists():
        with tarfile.open(archive) as sources:
            sources.extractall(work, filter="data")
        (next(path for path in work.glob("llama_cpp_python-*/vendor/llama.cpp"))).rename(folder)
    run("cmake", "-S", folder, "-B", folder / "build", "-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", "-DBUILD_SHARED_LIBS=OFF",
        "-DLLAMA_CURL=OFF", "-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_EXAMPLES=OFF", "-DLLAMA_BUILD_SERVER=OFF",
        "-DLLAMA_BUILD_TOOLS=ON", "-DLLAMA_BUILD_COMMON=ON", "-DLLAMA_OPENSSL=OFF")
    run("cmake", "--build", folder / "build", "--target", "llama-bench", "llama-quantize", "-j", jobs)
    return programs


def gguf_files(programs: Path, model: Path, work: Path) -> dict[str, Path]:
    half, four = work / f"{model.name}-F16.gguf", work / f"{model.name}-Q4_0.gguf"
    if not half.exists():
        run(BASEQ, "export", model, "--format", "gguf", "--gguf-type", "F16", "--output", half)
    if not four.exists():
        run(programs / "llama-quantize", half, four, "Q4_0", stderr=subprocess.DEVNULL)
    return {"llama.cpp Q4_0": four, "llama.cpp F16": half}


def measure_llama(programs: Path, file: Path, threads: int) -> dict:
    """Tokens a second: prefill, and decode at each depth."""
    speeds = {}
    output = run(programs / "llama-bench", "-m", file, "-t", threads, "-p", PREFILL, "-n", 0, "-r", 1, "-o", "json", stderr=subprocess.DEVNULL)
    speeds["prefill"] = json.loads(output)[0]["avg_ts"]
    for depth in DEPTHS:
        output = run(programs / "llama-bench", "-m", file, "-t", threads, "-p", 0, "-n", TOKENS, "-d", depth, "-r", 1, "-o", "json",
                     stderr=subprocess.DEVNULL)
        speeds[depth] = json.loads(output)[0]["avg_ts"]
    return speeds


def measure_baseq(model: Path, options: list[str], threads: int, work: Path) -> dict:
    report = work / "speed.json"
    run(BASEQ, "bench", model, "--threads", threads, "--depth", *sorted({PREFILL, *DEPTHS}), "--batch", 1, "--num-tokens", TOKENS,
        "--repetitions", 1, "--json", report, "--quiet", *options)
    rows = {row["depth"]: row for row in json.loads(report.read_text())["measurements"]}
    return {"prefill": rows[PREFILL]["prefill_tokens_per_second"]} | {depth: rows[depth]["decode_tokens_per_second"] for depth in DEPTHS}


def table(best: dict[str, dict], baseline: str) -> str:
    columns = ["prefill", *DEPTHS]
    lines = ["| | prefill 512 | " + " | ".join(f"decode at {depth}" for depth in DEPTHS) + " |", "|---|" + "--:|" * len(columns)]
    for name, speeds in best.items():
        cells = [f"{speeds[column]:.0f} ({speeds[column] / best[baseline][column]:.2f}x)" for column in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a checkpoint in full precision")
    parser.add_argument("--quantized", action="append", default=[], metavar="NAME=DIRECTORY[:OPTIONS]")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "llama.cpp")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    programs = llama_cpp(arguments.work, arguments.jobs)
    contestants = {name: lambda file=file: measure_llama(programs, file, arguments.threads)
                   for name, file in gguf_files(programs, arguments.model, arguments.work).items()}
    models = [("float32", str(arguments.model), ""), *((name, *path.partition(":")[::2])
              for name, _, path in (text.partition("=") for text in arguments.quantized))]
    for name, path, options in models:
        contestants[f"baseq {name}"] = lambda path=path, options=options: measure_baseq(
            Path(path), options.split(), arguments.threads, arguments.work)
    best: dict[str, dict] = {}
    for _ in range(arguments.rounds):
        for name, measure in contestants.items():
            speeds = measure()
            best[name] = {key: max(value, best.get(name, {}).get(key, 0)) for key, value in speeds.items()}
    print(f"{arguments.model.name}, {arguments.threads} thread(s), tokens a second (times llama.cpp Q4_0), best of {arguments.rounds} rounds\n")
    print(table(best, "llama.cpp Q4_0"))


if __name__ == "__main__":
    main()
