"""What one needs every day, with fastai's vision: `from adverfine.all import *`

Everything else is reached through its module, such as `adverfine.guards.guards`. No name of `fastai.vision.all` changes its meaning.
"""
from fastai.vision.all import *
from .threat import PixelModel, PixelSpace, ThreatModel, pixel_space
from .data import BatchDL, ImageSet, cifar10_dls, digits_dls, fashion_mnist_dls, image_dls, pixels
from .models import cnn8, evaluating, frozen, resnet18_cifar
from .cost import Cost, cost, latency, macs, storage_bytes
from .attacks import FGSM, FGSMRS, NFGSM, PGD, Attack, TorchAttack, Transfer
from .autoattack import APGD, FAB, AutoAttack, Square
from .channels import Taylor
from .pruning import PruningPlan, StructuredPruning, prune
from .sensitivity import robust_sensitivity
from .quantization import quantize
from .acceleration import BF16, Compile
from .objectives import MART, RSLAD, TRADES, Madry, Objective
from .adversarial import AdversarialTraining, CatastrophicOverfitting, FreeAdversarialTraining, RobustAccuracy, RobustOverfitting
from .evaluation import RobustnessReport, evaluate
from .checkpoint import compressed_info, load_compressed
from .recipes import AWP, EpsilonWarmup, WeightAverage, compress
from .deployment import OnnxNetwork, integer_network, lower, to_onnx, write_onnx
from .study import Cell, Study
from .report import accuracy_table, plot_study, write_report
