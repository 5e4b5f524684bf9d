"""The model repository of gRefCOCO. Importing it registers every family with the auto classes of transformers."""

from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoProcessor, AutoTokenizer

from .configuration_mdetr import MdetrConfig
from .configuration_rela import RelaConfig
from .configuration_vlt import VltConfig
from .image_processing_mdetr import MdetrImageProcessor
from .image_processing_rela import RelaImageProcessor
from .image_processing_vlt import VltImageProcessor
from .modeling_mdetr import MdetrModel
from .modeling_rela import RelaModel
from .modeling_vlt import VltModel
from .processing_mdetr import MdetrProcessor
from .processing_rela import RelaProcessor
from .processing_vlt import VltProcessor
from .tokenization_vlt import VltTokenizer

for config, model, image_processor, processor in (
    (RelaConfig, RelaModel, RelaImageProcessor, RelaProcessor),
    (MdetrConfig, MdetrModel, MdetrImageProcessor, MdetrProcessor),
    (VltConfig, VltModel, VltImageProcessor, VltProcessor),
):
    AutoConfig.register(config.model_type, config)
    AutoModel.register(config, model)
    AutoImageProcessor.register(config, image_processor_classes={"pil": image_processor})
    AutoProcessor.register(config, processor)
AutoTokenizer.register(VltConfig, VltTokenizer)
