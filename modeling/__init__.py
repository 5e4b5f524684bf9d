"""The model repository of gRefCOCO: ReLA and MDETR as transformers classes. Importing it registers ReLA."""

from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoProcessor

from .configuration_rela import RelaConfig
from .image_processing_rela import RelaImageProcessor
from .modeling_rela import RelaModel
from .processing_rela import RelaProcessor

AutoConfig.register("rela", RelaConfig)
AutoModel.register(RelaConfig, RelaModel)
AutoImageProcessor.register(RelaConfig, image_processor_classes={"pil": RelaImageProcessor})
AutoProcessor.register(RelaConfig, RelaProcessor)
