"""The model `rotorquant` of lm-eval: an `HFLM` whose requests all read a key-value cache.

`HFLM` scores with one forward pass and no cache, so its scores do not depend on the cache.
Here a batch goes through a new cache in passes (`probes/chunked.py`), so that log-likelihoods,
rolling ones and multiple choices read older tokens as they are stored. `generate_until` gives
`generate` a new cache: the prompt's own pass reads in full precision, as it does for every user of
`generate`; the tokens decoded after it read the codes.

For scoring, batches are padded on the right: no token reads what comes after it, so padding
changes neither logits nor statistics of a row, up to rounding. (Transformers' fp8 cache has one
scale for all rows, so there scores depend on the batch.) For `generate_until`, batches are padded
on the left, and padding enters the statistics of its row; batch_size=1 avoids it.
"""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Callable
from typing import Any

import torch
from lm_eval.api.model import CacheHook
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from transformers import Cache, LogitsProcessorList, PreTrainedModel

from rotorquant_hf.passing import cache_argument
from rotorquant_hf.placement import input_device

from ..caches.registry import CacheSpec
from ..errors import InputError
from ..places import shipped
from ..probes.chunked import passes
from ..probes.footprint import elements_of
from ..processes import on_cpus
from ..requirements import require_packages
from ..subjects import gguf
from .model_args import cache_of, check_names, chunk_of, refused
from .reads import (
    DecodingReads,
    Pass,
    Reads,
    nothing_compressed,
    tokens_before_codes,
    too_short,
)

_OWNER = "rotorquant: whose answers these are"  # a key of the file of --use_cache

_log = logging.getLogger("lm_eval.models.rotorquant")  # shown as lm-eval's own messages are


@register_model("rotorquant")
class RotorQuantLM(HFLM):
    """A causal language model that reads one of the caches of `caches/registry.py`.

    Args:
        pretrained: a folder, a GGUF file, a name on the Hub, or a loaded model (give its
            `tokenizer` too).
        cache: a name of `KINDS` or `PRESETS`, or a `CacheSpec`.
        chunk: max tokens per forward pass; by default 64, and for `dynamic` all, so that its
            scores are those of lm-eval's `hf`.
        make_cache: makes the caches instead (for the twins of a model).
        **kwargs: options of the cache; all others go to `HFLM`.

    Raises:
        InputError: for an unknown argument, a bad value or an encoder-decoder model.
        NotAvailableError: if the cache cannot be made here, or for this model.
    """

    batch_schedule: float  # HFLM's: how often it looks for a batch size

    def __init__(
        self,
        pretrained: str | PreTrainedModel,
        cache: str | CacheSpec = "rotorquant",
        chunk: int | None = None,
        make_cache: Callable[[], Cache] | None = None,
        **kwargs: Any,
    ) -> None:
        self.spec, kwargs = cache_of(cache, kwargs)
        self.chunk = chunk_of(chunk, self.spec)
        known = [name for name in inspect.signature(HFLM).parameters if name != "kwargs"]
        check_names(kwargs, known, loaded=not isinstance(pretrained, str))
        self._handed_on = [name for name in kwargs if name not in known]
        self.reads: dict[str, Reads] = {}
        self.warnings: list[str] = []
        self._foreseen: set[tuple[str, str]] = set()  # kinds and tasks warned of before their run
        self._reads, self._passes = Reads(), list[Pass]()
        self._load(pretrained, kwargs)
        if not isinstance(pretrained, str):  # HFLM takes the placeholders' of offloaded weights
            self._device = input_device(self._model)
        self._make_cache = make_cache or (lambda: self.spec.make(self.model.config))
        self._make_cache()  # an unavailable cache fails before any work
        accelerator = getattr(self, "accelerator", None)
        if accelerator is not None and self.world_size == 1:
            # HFLM splits the work only where it sees several GPUs; on CPUs, and with one GPU
            # visible to each process, every process would do all of it.
            self._rank, self._world_size = accelerator.process_index, accelerator.num_processes

    def _load(self, pretrained: str | PreTrainedModel, arguments: dict[str, Any]) -> None:
        """What `HFLM` does when it is made, of a GGUF file too."""
        on_cpus()
        name = shipped(pretrained) if isinstance(pretrained, str) else pretrained
        if isinstance(name, str) and gguf.is_gguf(name):
            require_packages("reading a GGUF file", gguf.PACKAGES)
            gguf.refuse_revision(name, arguments.get("revision"))
            with gguf.opened(name) as (folder, file):
                super().__init__(folder, gguf_file=file, **arguments)
        else:
            super().__init__(name, **arguments)

    def _get_backend(self, *args: Any, **kwargs: Any) -> None:
        super()._get_backend(*args, **kwargs)
        if self.backend != "causal":
            raise InputError(
                f"rotorquant takes causal language models, and this is a {self.backend} model "
                "(encoder and decoder): use --model hf"
            )

    def _create_model(self, *args: Any, **kwargs: Any) -> None:
        is_gguf = kwargs.get("gguf_file") is not None
        try:
            super()._create_model(*args, **kwargs | (gguf.dequantised() if is_gguf else {}))
        except TypeError as error:
            for name in self._handed_on:
                if f"'{name}'" in str(error):
                    raise refused(name, error) from error
            raise
        if is_gguf:
            gguf.plain(self._model)

    def set_cache_hook(self, cache_hook: CacheHook) -> None:
        """Take part in `--use_cache`, whose file knows requests by their text alone.

        Raises:
            InputError: if the file has answers of another model or cache.
        """
        if cache_hook.dbdict is not None:
            self._claim(cache_hook.dbdict)
        super().set_cache_hook(cache_hook)

    def _claim(self, answers: Any) -> None:
        """Write into a file of answers whose they are, or see that they are this model's."""
        own = json.dumps(
            {
                "model": self.config.name_or_path,
                "revision": str(self.revision),
                "dtype": str(self.model.dtype),
                "cache": self.spec.to_dict(),
                "chunk": self.chunk,
            },
            sort_keys=True,
        )
        saved = answers.get(_OWNER)
        if saved is None and len(answers) == 0:
            answers[_OWNER] = own
        elif saved != own:
            raise InputError(
                f"--use_cache: {answers.filename} has answers of another model or cache "
                f"({saved or 'none of rotorquant'}); name another file, or delete it"
            )

    def _batch_scheduler(self, pos: int, n_reordered_requests: list) -> int:
        schedule = self.batch_schedule
        # HFLM divides the requests among so many detections, and fails with fewer requests.
        self.batch_schedule = min(schedule, len(n_reordered_requests))
        try:
            return super()._batch_scheduler(pos, n_reordered_requests)
        finally:
            self.batch_schedule = schedule

    def _model_call(
        self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        """Logits (batch, tokens, vocabulary) of token ids (batch, tokens) through a new cache."""
        rows, length = inps.shape
        cache, before = self._make_cache(), 0
        logits = torch.empty(0)
        self._passes = []
        given = cache_argument(self.model, cache)
        with torch.no_grad(), self._autocast():
            for start, end in passes(cache, self.chunk or length, length):
                ids = inps[:, start:end]
                found = self.model(ids, **given, use_cache=True).logits
                if end - start == length:
                    logits = found
                else:
                    if not start:  # filled in place: two copies of the logits may not fit
                        logits = found.new_empty(rows, length, found.shape[-1])
                    logits[:, start:end] = found
                held, packed = elements_of(cache)
                self._passes.append(Pass(start, end, before // rows, held // rows))
                before = packed
        return logits

    def _autocast(self) -> torch.autocast:
        return torch.autocast(
            device_type=self.device.type,
            dtype=self.mixed_precision_dtype,
            enabled=self.mixed_precision_dtype is not None,
        )

    def _select_cont_toks(
        self, logits: Tensor, contlen: int | None = None, inplen: int | None = None
    ) -> Tensor:
        """The logits of one row's continuation; counts what its scored tokens read."""
        assert contlen is not None
        assert inplen is not None  # as for every causal model
        self._reads.score(self._passes, inplen - contlen, inplen)
        return super()._select_cont_toks(logits, contlen=contlen, inplen=inplen)

    def _model_generate(
        self, context: Tensor, max_length: int, stop: list[str], **generation_kwargs: Any
    ) -> Tensor:
        """Token ids (batch, prompt and continuation), generated with a new cache."""
        cache = self._make_cache()
        processors = generation_kwargs.pop("logits_processor", [])
        return super()._model_generate(
            context,
            max_length,
            stop,
            **cache_argument(self.model, cache),
            logits_processor=LogitsProcessorList([*processors, DecodingReads(cache, self._reads)]),
            **generation_kwargs,
        )

    def loglikelihood(self, requests: list, disable_tqdm: bool = False) -> list:
        """Like `HFLM`'s, through the cache."""
        return self._by_task("loglikelihood", super().loglikelihood, requests, disable_tqdm)

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list:
        """Like `HFLM`'s, through the cache, a new one for every window."""
        work = super().loglikelihood_rolling
        return self._by_task("loglikelihood_rolling", work, requests, disable_tqdm)

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list:
        """Like `HFLM`'s, with the cache."""
        return self._by_task("generate_until", super().generate_until, requests, disable_tqdm)

    def _by_task(
        self, kind: str, work: Callable[..., list], requests: list, disable_tqdm: bool
    ) -> list:
        """Run the requests task by task, so that each task's reads are known.

        All at once where batches must equal `hf`'s; where their size is found by trying, which
        HFLM does in every call; and where processes share the work: all must make the same number
        of rounds, and a process may have no document of a task.
        """
        names = [request.task_name or "requests" for request in requests]
        if self.world_size > 1 or self.chunk is None or self.batch_size == "auto":
            names = [", ".join(dict.fromkeys(names))] * len(names)
        self._foresee(kind, names, requests)
        found = [None] * len(requests)
        for name in dict.fromkeys(names):
            places = [i for i, other in enumerate(names) if other == name]
            self._reads = Reads()
            responses = work([requests[i] for i in places], disable_tqdm=disable_tqdm)
            self._note(kind, name, *self._over_all_processes(self._reads))
            for i, response in zip(places, responses, strict=True):
                found[i] = response
        return found

    def _foresee(self, kind: str, names: list[str], requests: list) -> None:
        """Warn, before any work, of tasks with no request long enough to read anything quantised.

        An estimate: `generate_until` may stop long before its last token.
        """
        if self.spec.is_baseline or self.chunk is None:
            return
        needed, short = tokens_before_codes(self._make_cache(), self.chunk), {}
        for name in dict.fromkeys(names):
            of_task = [x for x, other in zip(requests, names, strict=True) if other == name]
            longest = self._longest(kind, of_task, needed)
            if longest <= needed:
                short[name] = longest
        self._foreseen |= {(kind, name) for name in short}
        if short and self.rank == 0:
            _log.warning(too_short(kind, short, needed, self.spec))

    def _longest(self, kind: str, requests: list, enough: int) -> int:
        """Tokens fed by the longest request of all processes, or by one of more than `enough`."""
        longest = 0
        for request in requests:
            text, *rest = request.args
            if kind == "generate_until":
                tokens = rest[0].get("max_gen_toks", self.max_gen_toks)
            else:
                tokens = -1 if rest and text else 0  # the last token of a continuation is not fed
                text = "".join((text, *rest))
            longest = max(longest, tokens + len(self.tok_encode(text)))
            if longest > enough:
                break
        return int(self.all_gather(torch.tensor([longest], device=self.device)).max())

    def _note(self, kind: str, tasks: str, packed: int, held: int) -> None:
        """Count what was read; record, and log unless foreseen, that nothing was compressed."""
        self.reads.setdefault(tasks, Reads()).add(packed, held)
        if packed or not held or self.spec.is_baseline:
            return
        text = nothing_compressed(kind, tasks, self.spec.label)
        if text not in self.warnings:
            self.warnings.append(text)
        if self.rank == 0 and (kind, tasks) not in self._foreseen:
            _log.warning(text)

    def _over_all_processes(self, reads: Reads) -> tuple[int, int]:
        counts = torch.tensor([reads.packed, reads.held], device=self.device)
        packed, held = self.all_gather(counts).reshape(-1, 2).sum(0).tolist()
        return packed, held

    @property
    def compressed_share(self) -> float | None:
        """Share of the keys and values read by all requests so far that was read quantised."""
        total = Reads()
        for reads in self.reads.values():
            total.add(reads.packed, reads.held)
        return total.share

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes into the `config` of its results: the cache too, and the warnings."""
        return super().get_model_info() | {
            "cache": self.spec.to_dict(),
            "cache_chunk": self.chunk,
            "cache_compressed_share": {name: reads.share for name, reads in self.reads.items()},
            "cache_warnings": self.warnings,
        }
