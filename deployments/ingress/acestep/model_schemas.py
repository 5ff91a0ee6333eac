"""What ACE-Step's routes about models, counts and adapters answer, typed."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from deployments.ingress.acestep.schemas import Shape


class JobCounts(Shape):
    """Jobs by state."""

    total: int = Field(ge=0, description="All that are kept.", examples=[12])
    queued: int = Field(ge=0, description="That wait.", examples=[1])
    running: int = Field(ge=0, description="That run.", examples=[1])
    succeeded: int = Field(ge=0, description="With a result.", examples=[9])
    failed: int = Field(ge=0, description="Without one.", examples=[0])
    cancelled: int = Field(ge=0, description="That nobody wanted any more.", examples=[1])


class Stats(Shape):
    """Counts of jobs."""

    jobs: JobCounts = Field(description="How many there are in each state.")
    queue_size: int = Field(ge=0, description="Jobs that wait.", examples=[1])
    queue_maxsize: int = Field(ge=0, description="As many may wait.", examples=[200])
    avg_job_seconds: float = Field(ge=0, description="Seconds that a song took lately.", examples=[11.4])


class Pricing(Shape):
    """Nothing costs anything."""

    prompt: str = Field(description="USD per token: 0.", examples=["0"])
    completion: str = Field(description="USD per token: 0.", examples=["0"])
    request: str = Field(description="USD: 0.", examples=["0"])
    image: str = Field(description="USD: 0.", examples=["0"])


class ListedModel(Shape):
    """A renderer checkpoint, as OpenRouter lists models."""

    id: str = Field(description="For `model` of a chat.", examples=["acestep/acestep-v15-turbo"])
    name: str = Field(description="For people.", examples=["ACE-Step acestep-v15-turbo"])
    created: int = Field(description="Unix seconds; always a month ago.", examples=[1787408000])
    input_modalities: list[str] = Field(description="What it takes.", examples=[["text", "audio"]])
    output_modalities: list[str] = Field(description="What it gives.", examples=[["audio", "text"]])
    context_length: int = Field(description="Tokens.", examples=[4096])
    max_output_length: int = Field(description="Seconds that are promised for every card.", examples=[300])
    pricing: Pricing = Field(description="What it costs.")
    description: str = Field(description="What it is.", examples=["AI music generation model"])
    architecture: None = Field(description="Null.", examples=[None])


class ModelList(Shape):
    """All models, as OpenRouter lists them."""

    object: Literal["list"] = Field(description="`list`.")
    data: list[ListedModel] = Field(description="One per renderer checkpoint.")


class ListedModelAlone(ListedModel):
    """One model, as OpenAI's clients retrieve it."""

    object: Literal["model"] = Field(description="`model`.")
    owned_by: str = Field(description="`acestep`.", examples=["acestep"])


class RendererModel(Shape):
    """A renderer checkpoint."""

    name: str = Field(description="For `model` of a request.", examples=["acestep-v15-turbo"])
    is_default: bool = Field(description="It is taken where a request names none.", examples=[True])
    is_loaded: bool = Field(description="A replica with it runs.", examples=[True])
    supported_task_types: list[str] = Field(description="Values of `task_type`.", examples=[["text2music", "cover"]])


class PlannerModel(Shape):
    """A planner checkpoint."""

    name: str = Field(description="Its name.", examples=["acestep-5Hz-lm-0.6B"])
    is_loaded: bool = Field(description="A replica with it runs.", examples=[True])


class Inventory(Shape):
    """Models, and what they can do."""

    models: list[RendererModel] = Field(description="Renderer checkpoints.")
    default_model: str | None = Field(description="Null: none is known yet.", examples=["acestep-v15-turbo"])
    lm_models: list[PlannerModel] = Field(description="Planner checkpoints.")
    loaded_lm_model: str | None = Field(description="Null: no planner runs.", examples=["acestep-5Hz-lm-0.6B"])
    llm_initialized: bool = Field(description="A planner runs.", examples=[True])


class Initialized(Shape):
    """A model that is loaded."""

    message: str = Field(description="For people.", examples=["Model initialization completed"])
    slot: int = Field(ge=1, description="Its place in the list of models, from 1.", examples=[1])
    loaded_model: str = Field(description="Renderer checkpoint.", examples=["acestep-v15-turbo"])
    loaded_lm_model: str | None = Field(description="Null: no planner runs.", examples=["acestep-5Hz-lm-0.6B"])
    models: list[RendererModel] = Field(description="Renderer checkpoints.")
    lm_models: list[PlannerModel] = Field(description="Planner checkpoints.")
    llm_initialized: bool = Field(description="A planner runs.", examples=[True])


class Reloaded(Shape):
    """Never answered: nothing is reinitialized here."""


class LoraStatus(Shape):
    """What is loaded for a key."""

    lora_loaded: bool = Field(description="An adapter is active.", examples=[True])
    use_lora: bool = Field(description="Requests that follow take it.", examples=[True])
    lora_scale: float = Field(ge=0, le=1, description="Strength of the active one.", examples=[1.0])
    adapter_type: Literal["lora", "lokr"] | None = Field(description="Null: nothing active, or not known.")
    scales: dict[str, float] = Field(description="Strength, 0 to 1, by name.", examples=[{"jazz": 1.0}])
    active_adapter: str | None = Field(description="Name of the active one; null: none.", examples=["jazz"])
    adapters: list[str] = Field(description="Names of all that are loaded.", examples=[["jazz"]])
    synthetic_default_mode: bool = Field(description="False.", examples=[False])


class LoraMessage(Shape):
    """What was done."""

    message: str = Field(description="For people.", examples=["✅ LoRA loaded: jazz"])


class LoraLoaded(LoraMessage):
    """An adapter was taken."""

    lora_path: str = Field(description="As it was sent.", examples=["jazz.safetensors"])
    adapter_name: str | None = Field(None, description="As it was sent; left out where it was not.", examples=["jazz"])


class LoraToggled(LoraMessage):
    """What is loaded is used, or not."""

    use_lora: bool = Field(description="As it was sent.", examples=[True])


class LoraScaled(LoraMessage):
    """An adapter has another strength."""

    scale: float = Field(ge=0, le=1, description="As it was sent.", examples=[0.5])
    adapter_name: str | None = Field(None, description="As it was sent; left out where it was not.", examples=["jazz"])
