"""What vLLM processes of the tests are started with."""

import os


def environment(*, multiprocessing: bool = False, ranks: int = 1, plugin: bool = True) -> dict[str, str]:
    """The environment of a vLLM process on a machine with two cores and no network.

    Args:
        multiprocessing: the engine in a process of its own, as servers have it.
        ranks: of the model, each a process of its own if there are two.
        plugin: whether vLLM loads this package.
    """
    # one core to each of pytest's workers (gw0, gw1, ...), where engines do not share them anyway
    core = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % (os.cpu_count() or 1)
    return {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_INT4_W4A8": "0",  # with AMX, activations would be rounded to int8
        "VLLM_CPU_OMP_THREADS_BIND": "0|1" if multiprocessing or ranks > 1 else str(core),
        "VLLM_ENABLE_V1_MULTIPROCESSING": str(int(multiprocessing)),
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_PLUGINS": "srd" if plugin else "",
        "OMP_NUM_THREADS": "1",
    }
