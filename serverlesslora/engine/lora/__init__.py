"""LoRA over a shared read-only backbone: adapters are loaded strictly and added per segment of a packed batch."""

from serverlesslora.engine.lora.adapter import Adapter
from serverlesslora.engine.lora.batch import Segment
from serverlesslora.engine.lora.groups import join_adjacent
from serverlesslora.engine.lora.model import LoraModel

__all__ = ["Adapter", "LoraModel", "Segment", "join_adjacent"]
