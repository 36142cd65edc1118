"""The settings of a run: one frozen, validated tree, and the key by which its folder is known."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from headstart.layers.install import Subtracting
from headstart.methods.per_layer import spelled
from headstart.names import plain

# Raise where the meaning of a setting changes, so that earlier runs aren't taken for these.
SCHEMA = 1

Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, lt=1)]


def _number(value: Any) -> Any:
    # YAML reads 1e-4, without a point, as text.
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _listed(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


def _of_layers(value: Any) -> Any:
    """Return methods by pattern as one text, which keeps their order, in which the first that fits wins."""
    if not isinstance(value, dict):
        return value
    if odd := next((item for item in value.items() if not all(isinstance(part, str) for part in item)), None):
        raise ValueError(f"{odd[0]!r} stands for {odd[1]!r}: write a pattern of layers and its method, as text")
    return spelled(value)


def _for_all(value: Any) -> Any:
    return {"": value} if isinstance(value, str) else value


def _steps_or_epoch(value: Any) -> Any:
    if value in (None, "epoch") or (type(value) is int and value >= 1):
        return value
    raise ValueError(f"{value!r} is neither a whole number of steps nor 'epoch'")


Rate = Annotated[float, BeforeValidator(_number), Field(gt=0, allow_inf_nan=False)]
Amount = Annotated[float, BeforeValidator(_number), Field(ge=0, allow_inf_nan=False)]
Words = Annotated[tuple[str, ...], BeforeValidator(_listed)]


class Node(BaseModel):
    """A branch of the tree: frozen, and without settings that nobody knows."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class Model(Node):
    """The pretrained model.

    Attributes:
        name: a name of the Hugging Face Hub, a folder, a GGUF file, or ``smollm2``.
        revision: of the hub.
        dtype: of the weights in memory.
        bits: 4 or 8 load it quantised by bitsandbytes; 16 as ``dtype`` says.
    """

    name: str = "smollm2"
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    bits: Literal[4, 8, 16] = 16


class Data(Node):
    """What is learned.

    Attributes:
        task: its name with settings, such as ``gsm8k`` or ``gsm8k:prompt=alpaca-cot``; see ``headstart tasks``.
        train, held_out: files, folders or hub names in place of the task's own.
        held_out_task: of what is held out, where it isn't the task that is learned: ``gsm8k`` after ``metamath``.
        train_examples: the first so many; None for all.
        held_out_examples: on which the loss is measured before and after; of a single file, its last ones.
        validation_examples: the first so many of the training data, which are not trained on then: by them rates and
            states are chosen, so that what is held out is left to be reported.
    """

    task: str = "problems"
    train: str | None = None
    held_out: str | None = None
    held_out_task: str | None = None
    train_examples: Positive | None = None
    held_out_examples: Annotated[int, Field(ge=0)] = 200
    validation_examples: Annotated[int, Field(ge=0)] = 0


class Adapter(Node):
    """What PEFT's LoraConfig or VeraConfig is given.

    Attributes:
        kind: lora or vera.
        r, alpha, rslora, dropout, dora, rank_pattern, alpha_pattern: as PEFT has them.
        targets: "all-linear", a regular expression, or names.
        parameters: names of parameters that are no linear layer's, such as experts.down_proj of a mixture.
        modules_to_save: heads that train whole; a classifier's own always does.
    """

    kind: Literal["lora", "vera"] = "lora"
    r: Positive = 8
    alpha: Rate = 16
    rslora: bool = False
    dropout: Share = 0.0
    dora: bool = False
    targets: str | tuple[str, ...] = "all-linear"
    parameters: Words = ()
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, float] = {}
    modules_to_save: Words = ()


class Start(Node):
    """How the factors start.

    Attributes:
        method: its name with settings, such as ``pissa`` or ``lora-da:samples=64`` (see ``headstart methods``); or a
            mapping of these by pattern of layers, such as ``{"q_proj|v_proj": pissa, "*": lora}``
            (:class:`headstart.PerLayer`), which is held as text.
        form: of starts that must not change the model: "anchored" or "residual".
        preserve: of methods that protect an ability (sc-lora, lora-null), a text of it: a file, or a hub name, as
            ``evaluation.forgetting`` takes it; its first windows of ``batch.max_length`` tokens are read.
        memory_budget: for what a pass over the data sums, such as "6GiB"; None for half of what is free.
    """

    method: Annotated[str, BeforeValidator(_of_layers)] = "lora"
    form: Subtracting = "anchored"
    preserve: str | None = None
    memory_budget: str | None = None


class Optimizer(Node):
    """The optimiser.

    Attributes:
        name: adamw or sgd.
        lr: the peak rate.
        weight_decay: of the differences to an anchored start, and so towards the base model; of kept factors, to 0.
        lora_plus: the rate of B over that of A (LoRA+); None for one rate.
        beta1, beta2, eps: AdamW's.
        momentum: SGD's.
        max_grad_norm: gradients are cut to this norm; 0 for not.
    """

    name: Literal["adamw", "sgd"] = "adamw"
    lr: Rate = 1e-3
    weight_decay: Amount = 0.0
    lora_plus: Rate | None = None
    beta1: Share = 0.9
    beta2: Share = 0.999
    eps: Rate = 1e-8
    momentum: Share = 0.0
    max_grad_norm: Amount = 1.0


class Schedule(Node):
    """How long, and at which rate.

    Attributes:
        kind: how the rate falls after the warm-up.
        warmup: steps over which the rate rises, or, below 1, their share.
        epochs, steps: how long; one of them (one epoch where neither is given).
    """

    kind: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: Amount = 0.03
    epochs: Rate | None = None
    steps: Positive | None = None

    @model_validator(mode="after")
    def _one_length(self) -> Schedule:
        if self.epochs is not None and self.steps is not None:
            raise ValueError("epochs and steps are both given: leave one of them out")
        if self.warmup >= 1 and not float(self.warmup).is_integer():
            raise ValueError(f"warmup={self.warmup:g} is neither a share below 1 nor a whole number of steps")
        return self


class Batch(Node):
    """What a step sees.

    Attributes:
        size: samples a device and step.
        accumulation: batches a step of the optimizer.
        max_length: tokens; longer samples lose their end.
        packing: fill each row with several samples (text only).
    """

    size: Positive = 8
    accumulation: Positive = 1
    max_length: Positive = 512
    packing: bool = False


class Evaluation(Node):
    """What is measured, and when.

    Attributes:
        every: steps from one loss to the next during training, of the validation data where there are any, else of
            what is held out; or "epoch"; None for none.
        keep: the state after the last step, or that of the best of these losses, or of a classifier the best metric.
        graded_examples: how many of the held-out examples are answered and graded at the end.
        tasks: what else is graded at the end, as ``headstart eval`` does; figures are named "task/metric".
        data: files, folders or hub names in place of these tasks' own, by task; a name alone is for all of them.
        limit: of these tasks' items the first so many; None for all.
        forgetting: a text, a file or a hub name, whose loss is measured of the base model and at the end.
        forgetting_windows: its first so many windows of ``batch.max_length`` tokens.
        max_new_tokens: for each answer; None for the task's own.
        batch_size: samples that are measured or answered at a time; None for ``batch.size``, and twice that many
            answers.
        allow_code_execution: run programs that the model writes, confined, for tasks that grade such.
    """

    every: Annotated[int | Literal["epoch"] | None, BeforeValidator(_steps_or_epoch)] = None
    keep: Literal["last", "best"] = "last"
    graded_examples: Annotated[int, Field(ge=0)] = 0
    tasks: Words = ()
    data: Annotated[dict[str, str], BeforeValidator(_for_all)] = {}
    limit: Positive | None = None
    forgetting: str | None = None
    forgetting_windows: Positive = 256
    max_new_tokens: Positive | None = None
    batch_size: Positive | None = None
    allow_code_execution: bool = False

    @model_validator(mode="after")
    def _measured(self) -> Evaluation:
        if self.keep == "best" and self.every is None:
            raise ValueError("keep=best needs a measurement now and then: give every")
        return self


class Run(Node):
    """All that a run's result depends on.

    Attributes:
        trains: the adapter; of it B alone (lora-fa); biases alone (bitfit); or the whole model (full).
        precision: of the arithmetic: "float32", or by autocast.
        gradient_checkpointing: activations are computed again instead of kept.
        monitor: how many LoRA layers are watched in training (:class:`headstart.Monitor`); 0 for none.
        report_to: trackers that Transformers knows, such as "tensorboard" or "wandb".
        merged: write the merged model beside the adapter.
        seed: of the factors, the order of the data and dropout.
    """

    model: Model = Model()
    data: Data = Data()
    adapter: Adapter = Adapter()
    start: Start = Start()
    trains: Literal["adapter", "lora-fa", "bitfit", "full"] = "adapter"
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    batch: Batch = Batch()
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    gradient_checkpointing: bool = False
    evaluation: Evaluation = Evaluation()
    monitor: Annotated[int, Field(ge=0)] = 0
    report_to: Words = ()
    merged: bool = False
    seed: int = 0

    @model_validator(mode="after")
    def _fits_together(self) -> Run:
        if self.trains in ("bitfit", "full"):
            if self.start != Start():
                raise ValueError(f"trains={self.trains} has no adapter, so no start: leave start out")
            if self.adapter != Adapter():
                raise ValueError(f"trains={self.trains} has no adapter: leave adapter out")
            if self.optimizer.lora_plus is not None:
                raise ValueError(f"trains={self.trains} has no A and B: leave optimizer.lora_plus out")
            if self.model.bits != 16:
                raise ValueError(f"trains={self.trains} can't train weights of {self.model.bits} bits")
        if self.monitor and (self.trains in ("bitfit", "full") or self.adapter.kind == "vera"):
            raise ValueError("monitor watches layers of LoRA, of which this run has none: leave monitor out")
        if self.adapter.kind == "vera" and (self.adapter.dora or self.adapter.rslora or self.trains == "lora-fa"):
            raise ValueError("adapter.kind=vera goes with neither dora nor rslora nor lora-fa")
        if self.model.dtype == "float16" and self.precision == "float32":
            raise ValueError("model.dtype=float16 trains with precision=float16 alone, which scales the loss")
        if self.optimizer.name == "sgd" and self.optimizer.lora_plus is not None:
            raise ValueError("optimizer.lora_plus is made for adamw")
        if self.evaluation.every and not (
            self.data.validation_examples or self.data.held_out_examples or self.evaluation.graded_examples
        ):
            raise ValueError("evaluation.every has nothing to measure: give data.held_out_examples")
        return self

    @property
    def answers_at_once(self) -> int:
        """How many samples are answered at a time."""
        return self.evaluation.batch_size or 2 * self.batch.size

    @property
    def key(self) -> str:
        """Eight digits of a hash of the settings that differ from the defaults: new ones with defaults change none."""
        changed = self.model_dump(mode="json", exclude_defaults=True)
        changed.pop("report_to", None)
        text = json.dumps([SCHEMA, changed], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:8]

    @property
    def folder_name(self) -> str:
        """A readable name and the key."""
        words = [self.model.name.rstrip("/").rpartition("/")[2], self.data.task, self.started_as, f"s{self.seed}"]
        name = "-".join(words)
        return plain(name)[:80] + f"-{self.key}"

    @property
    def started_as(self) -> str:
        """The start's method, or what trains where there is no start."""
        return self.start.method if self.trains in ("adapter", "lora-fa") else self.trains
