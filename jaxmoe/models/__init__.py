"""Decoder language models whose feed-forward layers are `jaxmoe.nn.MoE`; needs Flax.

>>> from jaxmoe import models
>>> model = models.load(models.bundled(), "nvfp4")                             # doctest: +SKIP
>>> print(models.generate_text(model, "The :mod:`queue` module"))              # doctest: +SKIP
"""

from jaxmoe.models._architecture import Architecture as Architecture
from jaxmoe.models._architecture import Attention as Attention
from jaxmoe.models._architecture import DeltaNet as DeltaNet
from jaxmoe.models._architecture import Dense as Dense
from jaxmoe.models._architecture import Experts as Experts
from jaxmoe.models._architecture import LatentAttention as LatentAttention
from jaxmoe.models._architecture import Layer as Layer
from jaxmoe.models._cache import Cache as Cache
from jaxmoe.models._calibration import calibrated_modules as calibrated_modules
from jaxmoe.models._calibration import input_amax as input_amax
from jaxmoe.models._config import DecoderConfig as DecoderConfig
from jaxmoe.models._decoder import Decoder as Decoder
from jaxmoe.models._decoder import DecoderAux as DecoderAux
from jaxmoe.models._evaluation import Score as Score
from jaxmoe.models._evaluation import evaluate as evaluate
from jaxmoe.models._families import read_config as read_config
from jaxmoe.models._generation import SEPARATOR as SEPARATOR
from jaxmoe.models._generation import generate as generate
from jaxmoe.models._generation import generate_text as generate_text
from jaxmoe.models._generation import generate_tokens as generate_tokens
from jaxmoe.models._pretrained import load_pretrained as load_pretrained
from jaxmoe.models._rope import Linear as Linear
from jaxmoe.models._rope import Llama3 as Llama3
from jaxmoe.models._rope import Rope as Rope
from jaxmoe.models._rope import Yarn as Yarn
from jaxmoe.models._sampling import Sampling as Sampling
from jaxmoe.models._sampling import sample as sample
from jaxmoe.models._storage import available_formats as available_formats
from jaxmoe.models._storage import bundled as bundled
from jaxmoe.models._storage import is_own as is_own
from jaxmoe.models._storage import load as load
from jaxmoe.models._storage import save as save
from jaxmoe.models._text import ByteText as ByteText
from jaxmoe.models._text import TextStream as TextStream
from jaxmoe.models._text import Tokenizer as Tokenizer
