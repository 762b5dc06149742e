"""model: one base in memory and its adapters, as PEFT holds them; the model's thread alone works with it."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peft
import torch
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from launcher.adapters.lineage import WEIGHTS
from launcher.errors import ModelError
from launcher.planning.plan import QuantNumbers
from launcher.recipe.schema import ModelSection
from launcher.serving.names import BASE, Entry
from launcher.serving.opened import Opened, dtype_of, refuse_other_shapes
from launcher.worker.base import check_architecture, check_weights, keep_packing, quantization_config, reading

if TYPE_CHECKING:
    from launcher.serving.rows import Row


def load_base(folder: Path, *, dtype: str, quantization: Mapping[str, Any] | None, device: str) -> PreTrainedModel:
    """Load a base as its adapters were trained on it: `quantization` has the recipe's field names.

    Raises:
        ModelError: it is incomplete, pickled, no causal language model, or needs code of its own.
    """
    section = ModelSection(name_or_path=str(folder))
    check_weights(section)
    options: dict[str, Any] = {"dtype": dtype_of(dtype), "use_safetensors": True, "trust_remote_code": False}
    if quantization:
        numbers = QuantNumbers(
            quant_type=quantization["bnb_4bit_quant_type"],
            double_quant=quantization["bnb_4bit_use_double_quant"],
            compute_dtype=quantization["bnb_4bit_compute_dtype"]
            if quantization["bnb_4bit_compute_dtype"] != "auto"
            else dtype,
            storage_dtype="uint8",
        )
        options |= {"quantization_config": quantization_config(numbers), "device_map": {"": device}}
    with reading(section):
        check_architecture(section)
        loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(str(folder), **options)
    if not quantization:
        loaded.to(device)
    keep_packing(loaded)
    return loaded.eval()


class Served:
    """The base, with whatever adapters were added."""

    def __init__(self, base: PreTrainedModel, device: str) -> None:
        self._base: Any = base
        self._tuned: Any = None
        self._alone: set[str] = set()
        self._mixes = True
        self._virtual: dict[str, Tensor] = {}
        self._prefix: dict[str, Tensor] = {}
        self.device = device
        self._takes = frozenset(inspect.signature(base.forward).parameters)
        self.can_join = _can_join(base)

    @property
    def context(self) -> int | None:
        """Positions that the base was made for, and that rows of one batch can share."""
        config = self._base.config.get_text_config()
        found = getattr(config, "max_position_embeddings", None)
        short = _one_scale(getattr(config, "rope_parameters", None) or {})
        return min((int(one) for one in (found, short) if one), default=None)

    @property
    def vocabulary(self) -> int:
        """Tokens that have an embedding."""
        return int(self._base.get_input_embeddings().weight.shape[0])

    @property
    def ends(self) -> frozenset[int]:
        """Tokens that end a text, as the base's generation_config says."""
        found = getattr(self._base.generation_config, "eos_token_id", None)
        return frozenset([found] if isinstance(found, int) else found or ())

    def add(self, key: str, opened: Opened) -> None:
        """Add an adapter.

        Raises:
            ModelError: it does not fit; nothing has changed.
        """
        if not opened.in_model:
            self._add_virtual(key, opened)
            return
        refuse_other_shapes(opened, self._tuned.base_model.model if self._tuned is not None else self._base)
        try:
            with warnings.catch_warnings():
                # What PEFT would only warn of is compared below.
                warnings.simplefilter("ignore")
                self._add_weights(key, str(opened.readable))
            self._refuse_lost(key, opened)
        except Exception as error:
            self._undo(key)
            if isinstance(error, ModelError):
                raise
            raise ModelError(f"{opened.folder}: PEFT cannot add it: {str(error).splitlines()[0]}") from error
        if opened.alone:
            self._alone.add(key)
        self._settle()

    def _add_virtual(self, key: str, opened: Opened) -> None:
        width = self._base.get_input_embeddings().weight.shape[1]
        if opened.virtual is not None:
            if opened.virtual.shape[1] != width:
                raise ModelError(
                    f"{opened.folder}: its tokens have {opened.virtual.shape[1]} numbers, the base's {width}"
                )
            self._virtual[key] = opened.virtual.to(self.device, self._base.dtype)
        if opened.prefix is not None:
            self._prefix[key] = opened.prefix.to(self.device, self._base.dtype)

    def _add_weights(self, key: str, folder: str) -> None:
        if self._tuned is None:
            self._tuned = peft.PeftModel.from_pretrained(
                self._base, folder, adapter_name=key, torch_device=self.device
            ).eval()
        else:
            self._tuned.load_adapter(folder, adapter_name=key, torch_device=self.device)
            self._tuned.eval()

    def _refuse_lost(self, key: str, opened: Opened) -> None:
        with safe_open(opened.readable / WEIGHTS, framework="pt") as file:
            on_disk = set(file.keys())
        loaded = peft.get_peft_model_state_dict(self._tuned, adapter_name=key, save_embedding_layers=False).keys()
        lost = sorted(on_disk ^ set(loaded))
        if lost:
            raise ModelError(f"{opened.folder}: {len(lost)} tensors do not load, such as {lost[0]}")

    def _undo(self, key: str) -> None:
        """The model as it was before an adapter that could not be added."""
        if self._tuned is not None:
            self.drop(key)
            return
        for name, module in list(self._base.named_modules()):
            wrapped = isinstance(module, AuxiliaryTrainingWrapper)
            if wrapped or isinstance(module, BaseTunerLayer):
                parent, _, child = name.rpartition(".")
                inner = module.original_module if wrapped else module.get_base_layer()
                setattr(self._base.get_submodule(parent), child, inner)

    def drop(self, key: str) -> None:
        """Forget an adapter; no row may need it any more."""
        for table in (self._virtual, self._prefix):
            table.pop(key, None)
        self._alone.discard(key)
        if self._tuned is None or key not in self._tuned.peft_config:
            return
        if len(self._tuned.peft_config) == 1:
            self._base, self._tuned = self._tuned.unload(), None
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that another one is active now
                self._tuned.delete_adapter(key)
        self._settle()

    # ------------------------------------------------------------ one forward pass

    def new_cache(self) -> DynamicCache:
        """An empty cache: of whole attention where rows are to join it, else as the model wants it."""
        return DynamicCache() if self.can_join else DynamicCache(config=self._base.config)

    def reads_by_itself(self, entry: Entry) -> bool:
        """Whether a row must not be read in a batch with others: padding would stand behind its prefix."""
        return entry.key in self._prefix or entry.key in self._virtual

    def prefix(self, entry: Entry) -> Tensor | None:
        """Keys and values that stand before the prompt: layers x 2 x heads x tokens x numbers."""
        return self._prefix.get(entry.key)

    def virtual_tokens(self, entry: Entry) -> int:
        """Positions that the adapter itself takes."""
        virtual, prefix = self._virtual.get(entry.key), self._prefix.get(entry.key)
        return (0 if virtual is None else virtual.shape[0]) + (0 if prefix is None else prefix.shape[3])

    def embedded(self, row: Row) -> Tensor:
        """The prompt as ids, or with virtual tokens before it as embeddings (tokens x width)."""
        ids = torch.tensor(row.prompt, device=self.device)
        virtual = self._virtual.get(row.entry.key)
        return ids if virtual is None else torch.cat([virtual, self._embedding()(ids).to(virtual.dtype)])

    def _embedding(self) -> nn.Module:
        """The base's own embedding, whatever adapters stand around it."""
        module = self._base.get_input_embeddings()
        if isinstance(module, BaseTunerLayer):
            module = module.get_base_layer()
        own: nn.Module = getattr(module, "original_module", module)
        return own

    def logits(
        self,
        rows: Sequence[Row],
        inputs: Mapping[str, Tensor],
        mask: Tensor,
        positions: Tensor,
        cache: DynamicCache,
        *,
        every: bool = False,
    ) -> Tensor:
        """Logits after the last token of every row (B, 1, V), each with its own adapter; `cache` grows.

        `every`: after each token (B, T, V).
        """
        given: dict[str, Any] = {**inputs, "attention_mask": mask, "past_key_values": cache, "use_cache": True}
        given |= {"position_ids": positions} if "position_ids" in self._takes else {}
        given |= {"logits_to_keep": 1} if "logits_to_keep" in self._takes and not every else {}
        try:
            found: Tensor = self._forward(rows, given).logits
        except BaseException:
            self._forget_hooks()
            raise
        return found if every else found[:, -1:]

    def group(self, entry: Entry) -> str | None:
        """Rows of one group can share a forward pass; None: all that PEFT mixes. Changes as adapters come and go."""
        key = entry.key if self._tuned is not None and entry.key in self._tuned.peft_config else BASE
        return key if key in self._alone or not self._mixes else None

    def _settle(self) -> None:
        """Whether PEFT can mix now: not with replaced modules or fused experts; their wrappers outlive an adapter."""
        modules = self._tuned.modules() if self._tuned is not None else ()
        self._mixes = not any(isinstance(module, (ParamWrapper, AuxiliaryTrainingWrapper)) for module in modules)

    def _forward(self, rows: Sequence[Row], given: dict[str, Any]) -> Any:
        if self._tuned is None:
            return self._base(**given)
        group = self.group(rows[0].entry)
        if group == BASE:
            with self._tuned.disable_adapter():
                return self._tuned(**given)
        if group is not None:
            self._activate(group)
            return self._tuned(**given)
        there = self._tuned.peft_config
        return self._tuned(adapter_names=[row.entry.key if row.entry.key in there else BASE for row in rows], **given)

    def _forget_hooks(self) -> None:
        """PEFT leaves its hooks in the model when a mixed pass fails, and every later one would fail on them."""
        if self._tuned is None:
            return
        for module in self._tuned.modules():
            for number, hook in list(module._forward_pre_hooks.items()):
                if isinstance(hook, functools.partial) and "adapter_names" in hook.keywords:
                    module._forward_pre_hooks.pop(number)
                    module._forward_pre_hooks_with_kwargs.pop(number, None)

    def _activate(self, key: str) -> None:
        if self._tuned.active_adapter != key:
            self._tuned.set_adapter(key, inference_mode=True)


def _one_scale(rope: Mapping[str, Any]) -> int | None:
    """Up to where longrope (Ding et al., arXiv 2402.13753) turns all positions alike; None: it is not longrope.

    Beyond, the library turns every row of a batch by the longest one's scale, and keys that are held keep theirs.
    """
    each = rope.values() if rope and all(isinstance(one, Mapping) for one in rope.values()) else [rope]
    found = [one.get("original_max_position_embeddings") for one in each if one.get("rope_type") == "longrope"]
    return min((int(one) for one in found if one), default=None)


def _can_join(base: PreTrainedModel) -> bool:
    """Whether every layer keeps keys and values of each position, so that padding can be put before them."""
    kinds = set(getattr(base.config.get_text_config(), "layer_types", None) or ())
    layers = DynamicCache(config=base.config).layers
    return "chunked_attention" not in kinds and all(
        type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers
    )
