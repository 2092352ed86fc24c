"Pruning and quantization: the optimizer follows, nothing frozen thaws, gradients are what the formula says"
from functools import partial
import pytest, torch
from torch import nn
from fastai.vision.all import Learner, SGD, Adam, OptimWrapper
from adverfine.acceleration import *
from adverfine.adversarial import *
from adverfine.attacks import *
from adverfine.cost import *
from adverfine.data import *
from adverfine.models import *
from adverfine.pruning import *
from adverfine.quantization import *

opts = dict(sgd=partial(SGD, mom=.9), adam=Adam, torch_sgd=partial(OptimWrapper, opt=torch.optim.SGD, momentum=.9), torch_adam=partial(OptimWrapper, opt=torch.optim.Adam))

def _learner(opt='adam', net=None, **kw):
    torch.manual_seed(0)
    return Learner(digits_dls(n_train=256), net or cnn8(size=8), opt_func=opts[opt], **kw)

def _fit(learn, *args, **kw):
    with learn.no_bar(), learn.no_logging(): learn.fit(*args, **kw)

def _check_optimizer(learn):
    "Every trainable parameter is in the optimizer, nothing else is, and a step moves them all"
    mine = {id(p) for ps in learn.opt.param_lists for p in ps}
    assert mine=={id(p) for p in learn.model.parameters()}
    before = {n: p.detach().clone() for n,p in learn.model.named_parameters()}
    _fit(learn, 2, 1e-3)
    still = [n for n,p in learn.model.named_parameters() if torch.equal(p, before[n])]
    assert not still, still

@pytest.mark.parametrize('opt', opts)
def test_optimizer_follows(opt):
    learn = _learner(opt)
    _fit(learn, 1, 1e-3)
    learn.prune(.5)
    _check_optimizer(learn)
    learn.quantize(8)
    _check_optimizer(learn)
    learn.quantize(4)                    # a twin can be given other bits
    _check_optimizer(learn)

@pytest.mark.parametrize('opt', opts)
def test_state_is_cut_like_the_weights(opt):
    learn = _learner(opt)
    _fit(learn, 1, 1e-3)
    states = learn.opt.opt.state if 'torch' in opt else learn.opt.state
    old = {n: (p.detach().clone(), {k: v.clone() for k,v in states[p].items() if torch.is_tensor(v) and v.shape==p.shape}) for n,p in learn.model.named_parameters()}
    assert all(s for _,s in old.values())
    learn.prune(.5)
    for n,p in learn.model.named_parameters():
        w,state = old[n]
        kept = p.shape!=w.shape
        for k,v in state.items():
            new = states[p][k]
            assert new.shape==p.shape
            pairs = {(a,b) for a,b in zip(w.flatten().tolist(), v.flatten().tolist())}      # each weight keeps the state it had
            assert {(a,b) for a,b in zip(p.flatten().tolist(), new.flatten().tolist())} <= pairs

def test_residual_network():
    x = torch.rand(2, 3, 32, 32)
    net = resnet18_cifar()
    net.layer1.eval(); net.conv1.weight.requires_grad_(False); net.fc.bias.requires_grad_(False)
    flags,frozen = {n: m.training for n,m in net.named_modules()},{n for n,p in net.named_parameters() if not p.requires_grad}
    before = cost(net, x).macs
    prune(net, .5, x)
    assert cost(net, x).macs <= .3*before and net.fc.out_features==10
    assert flags=={n: m.training for n,m in net.named_modules()}
    assert frozen=={n for n,p in net.named_parameters() if not p.requires_grad}
    quantize(net, 4, [x])
    net(x).sum().backward()

def test_prune_refuses_and_changes_nothing():
    x = torch.rand(2, 1, 8, 8)
    twin = cnn8(size=8); quantize(twin, 8, [x])
    normed = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(1, 4, 3)), nn.Flatten(), nn.Linear(4*36, 10))
    for net,level,why in [(twin, .5, 'prune before quantizing'), (normed, .5, 'parametriz'), (nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), .5, 'no prunable layers'), (cnn8(size=8), 0, 'level=0'), (cnn8(size=8), .98, 'at most 0.969')]:
        shapes = [p.shape for p in net.parameters()]
        with pytest.raises(ValueError, match=why): prune(net, level, x)
        assert shapes==[p.shape for p in net.parameters()] and all(p.requires_grad for p in net.parameters()) and all(m.training for m in net.modules())

def test_pruning_in_a_fit_reaches_its_level_with_one_epoch_and_with_many():
    for epochs in (1, 3):
        learn = _learner('sgd')
        _fit(learn, epochs, 1e-3, cbs=[StructuredPruning(.5), AdversarialTraining(PGD(.1, steps=1))])
        assert learn.model[0].out_channels==16
        _check_optimizer(learn)

@pytest.mark.parametrize('bits,signed,offset', [(8, True, 0), (4, False, 0), (2, True, 0), (1, True, .5), (1, False, 0)])
def test_gradients_are_the_formula(bits, signed, offset):
    torch.manual_seed(0)
    q = Quantizer(bits, signed)
    q.begin(torch.tensor(.1))
    x,grad = torch.randn(7, 50).mul(.1*2**bits).requires_grad_(),torch.randn(7, 50)
    out = q(x)
    gx,gs = torch.autograd.grad(out, [x, q.log_gain], grad)
    s,lo,hi = .1,q.lo,q.hi
    c = torch.round(x/s-offset).clamp(lo, hi)
    inside = (x/s-offset>=lo-.5) & (x/s-offset<=hi+.5)
    torch.testing.assert_close(out, (c+offset)*s)
    torch.testing.assert_close(gx, grad*inside)
    torch.testing.assert_close(gs, (grad*((c+offset)-inside*x/s)*s).sum()/50**q.tempering, rtol=1e-4, atol=1e-4)
    assert len(out.unique())<=2**bits

def test_twin_keeps_its_state_dict():
    x = torch.rand(8, 1, 8, 8)
    a,b = cnn8(size=8),cnn8(size=8)
    quantize(a, 4, [x]); quantize(b, 4, [x*.5])
    b.load_state_dict(a.state_dict())
    assert torch.equal(a(x), b(x))

def test_calibration_is_on_training_images_only():
    seen = []
    learn = _learner()
    class Spy(nn.Module):
        def forward(self, x): seen.append(x.clone()); return x
    learn.model = nn.Sequential(Spy(), *learn.model)
    learn.quantize(4)
    train = {im.numpy().tobytes() for im in learn.dls.train.dataset.x}
    assert seen and all(im.numpy().tobytes() in train for x in seen for im in x)

@pytest.mark.parametrize('bits', [16, 8, 4, 2, 1])
def test_adversarial_fine_tuning_of_a_twin(bits):
    learn = _learner(metrics=RobustAccuracy(PGD(.1, steps=2)))
    learn.quantize(bits)
    _fit(learn, 1, 1e-3, cbs=[AdversarialTraining(PGD(.1, steps=2)), BF16()])
    assert all(p.isfinite().all() for p in learn.model.parameters())
