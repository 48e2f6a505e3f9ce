"""Another alpha for a running engine, through vLLM's own doors: a worker extension and `reload_weights`."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from srd_modifier.checkpoint.config import CONFIG_KEY, check_alphas
from srd_modifier.errors import CheckpointError, ConfigError, SRDError
from srd_modifier.selection.depth import check_chunks

EXTENSION = "srd_modifier.vllm.dial.Dial"


class Dial:
    """The part of each worker that turns the dial: `LLM(..., worker_extension_cls="srd_modifier.vllm.dial.Dial")`.

    vLLM makes it a base class of its workers.
    """

    vllm_config: Any
    get_model: Callable[[], Any]
    reload_weights: Callable[[], None]

    def check_srd_config(self, settings: dict[str, Any]) -> str | None:
        """Why the weights of these settings cannot be loaded, as text: it arrives from other processes as it is."""
        from vllm.config import set_current_vllm_config

        from srd_modifier.vllm.stream import corrected_weights

        try:
            with self._with(settings) as model_config, set_current_vllm_config(self.vllm_config):
                corrected_weights((), model_config, self.get_model())
        except SRDError as error:
            return str(error)
        return None

    def set_srd_config(self, settings: dict[str, Any]) -> str | None:
        """Load the weights again with other settings; where that fails half-way, the worker computes no more.

        Args:
            settings: as in `--hf-overrides '{"srd_config": {...}}'`.

        Returns:
            What went wrong, if anything.
        """
        error = self.check_srd_config(settings)
        if error is not None:
            return error
        try:
            with self._with(settings) as model_config:
                self.reload_weights()
        except Exception as raised:
            sentence = f"{raised}; the weights are those of two settings now: start the engine again"

            def refuse(*_: Any, **__: Any) -> None:
                raise SRDError(sentence)

            self.execute_model = refuse
            return sentence
        setattr(model_config.hf_config, CONFIG_KEY, settings)
        return None

    @contextmanager
    def _with(self, settings: dict[str, Any]) -> Iterator[Any]:
        model_config = self.vllm_config.model_config
        before = getattr(model_config.hf_config, CONFIG_KEY)
        setattr(model_config.hf_config, CONFIG_KEY, settings)
        try:
            yield model_config
        finally:
            setattr(model_config.hf_config, CONFIG_KEY, before)


def set_alpha(
    engine: Any,
    alpha: float,
    *,
    layer_alphas: Mapping[str, float] | None = None,
    chunks: Iterable[str] | None = None,
) -> None:
    """Turn the dial of a running engine.

    Every rank reads its weights from disk again, in place; what the engine has cached of prompts is dropped. No
    request may be running.

    Args:
        engine: a `vllm.LLM` that was started with `worker_extension_cls="srd_modifier.vllm.dial.Dial"` and with
            `hf_overrides={"srd_config": {"compute": "merge"}}` (else layers that were started at alpha 0 stay W4).
        alpha: 0 gives the W4 weights, 1 the full correction.
        layer_alphas: alpha by module name or `re:` pattern, for modules that shall differ.
        chunks: correct only these chunks of depth; None is all.

    Raises:
        ConfigError: a setting is out of range, or the engine cannot be turned; nothing has changed in any rank.
        CheckpointError: a file was damaged since the engine's start; the engine must be started again.
    """
    check_alphas(alpha, layer_alphas)
    settings: dict[str, Any] = {"alpha": alpha, "layer_alphas": dict(layer_alphas or {}), "compute": "merge"}
    if chunks is not None:
        settings["chunks"] = list(check_chunks(chunks))
    started_with = engine.llm_engine.vllm_config.parallel_config.worker_extension_cls
    if started_with != EXTENSION:
        raise ConfigError(
            f'the dial of this engine cannot be turned: start it with worker_extension_cls="{EXTENSION}"'
            + (f" instead of {started_with!r}" if started_with else "")
        )
    if engine.llm_engine.has_unfinished_requests():
        raise ConfigError("the dial of this engine cannot be turned while requests are running")
    for method, kind in (("check_srd_config", ConfigError), ("set_srd_config", CheckpointError)):
        errors = list(filter(None, engine.collective_rpc(method, args=(settings,))))
        if errors:
            raise kind(errors[0])
    # a block may still be held by a request that has just ended, or lie outside of the engine
    if not engine.reset_prefix_cache(reset_running_requests=True, reset_connector=True):
        raise SRDError("the dial is turned, but not all that is cached of prompts was dropped: start the engine again")
