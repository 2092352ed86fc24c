"Evaluations that go on with stronger attacks, and around what hides gradients"
import pytest, torch
from torch import nn, Tensor
from fastai.vision.all import Learner, set_seed
from adverfine.threat import PixelModel, PixelSpace
from adverfine.networks.zoo import cnn8
from adverfine.data.pixels import pixels
from adverfine.data.sources import digits_dls
from adverfine.attacks.gradient import FGSM, PGD
from adverfine.attacks.square import Square
from adverfine.attacks.surrogates import inner_networks, Inside, Smoothed, StraightThrough
from adverfine.evaluation.robustness import evaluate
from adverfine.training.adversarial import AdversarialTraining
from adverfine.bench.adaptive import contest_run
import adverfine.compression.quantization, fastai.callback.progress, fastai.callback.schedule  # noqa: F401 verbs of a Learner

class Then(nn.Module):
    def __init__(self, f): super().__init__(); self.f = f
    def forward(self, x): return self.f(x)

@pytest.mark.parametrize('f', [lambda x: (x*9).round()/9, lambda x: (x*9).add_(0).round_()/9, lambda x: (x*9).long()/9.,
    lambda x: (x*255).to(torch.uint8).float()/255, lambda x: x.clamp(.3, .6), lambda x: (x*1).clamp_(min=.5),
    lambda x: torch.floor(x*9)/9, lambda x: x.detach(), lambda x: (x*2).detach()/2,
    lambda x: [z := x*9, z.round_(), z/9][2]], ids=range(10))
def test_straight_through(f):
    "The value is the network's, the derivative that of the identity"
    w = torch.arange(1., 19).view(1, 2, 3, 3)
    def net(x): return f(x).mul(w).flatten(1).sum(1, keepdim=True)*torch.tensor([[1., -1]])
    x = torch.rand(4, 2, 3, 3, requires_grad=True)
    through = StraightThrough(net)
    assert through.changes(x)
    out = through(x)
    torch.testing.assert_close(out, net(x.detach()), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(torch.autograd.grad(out[:,0].sum(), x)[0], w.expand(4, -1, -1, -1), rtol=1e-4, atol=1e-4)

def test_straight_through_leaves_what_does_not_depend_on_pixels():
    w = torch.rand(2, 18)
    assert not StraightThrough(lambda x: x.flatten(1)@w.round().detach().clamp(0, 1).T).changes(torch.rand(2, 2, 3, 3))
    assert not StraightThrough(lambda x: x.flatten(1).to(torch.float32)@w.T).changes(torch.rand(2, 2, 3, 3))
    assert not StraightThrough(lambda x: w[(x*9).long().flatten(1)[:,0]%2]).changes(torch.rand(2, 2, 3, 3))

def test_inside():
    net = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4, 3))
    x = torch.rand(5, 1, 4, 4, requires_grad=True)
    small = Then(lambda x, f=nn.AvgPool2d(2): net((f(x)*9).round()/9))        # images of another size go in
    inside = Inside(small, net)
    torch.testing.assert_close(inside(x), small(x))
    grad, = torch.autograd.grad(inside(x)[:,0].sum(), x)
    assert grad.shape==x.shape and grad.abs().sum()>0
    same = Inside(Then(lambda x: net((x*9).round()/9)), net)
    expected, = torch.autograd.grad(net(z := ((x.detach()*9).round()/9).requires_grad_())[:,0].sum(), z)
    torch.testing.assert_close(torch.autograd.grad(same(x)[:,0].sum(), x)[0], expected)
    with pytest.raises(RuntimeError, match='no longer called'): Inside(lambda x: x.flatten(1), net)(x)

def test_inner_networks():
    net,x = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)),torch.rand(2, 1, 4, 4)
    assert inner_networks(net, x)==[] and inner_networks(lambda x: net(x.round()), x)==[net]
    pixel = PixelModel(net, PixelSpace())
    assert inner_networks(pixel, x)==[]                                       # it only normalises
    assert inner_networks(Then(lambda x: pixel(x.round())), x)==[pixel]
    outer = nn.Sequential(Then(lambda x: x), net)
    assert inner_networks(Then(outer), x)==[outer, net]
    assert inner_networks(nn.Sequential(net, nn.Linear(3, 5)), x)==[]         # no logits
    with pytest.raises(ValueError, match='sigma=0'): Smoothed(net, 0)
    with pytest.raises(ValueError, match='samples=0'): Smoothed(net, samples=0)

# ---- escalation

def _train(learn, epochs):
    cb = AdversarialTraining(PGD(.1, steps=3))
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(epochs, 5e-3, cbs=cb)

@pytest.fixture(scope='module')
def nets():
    "Networks after standard training, and after adversarial training in float32, 4 bits and 1 bit; and images"
    set_seed(0)
    learn = Learner(digits_dls(), cnn8(size=8))
    x,y = (o.as_subclass(Tensor)[:150] for o in pixels(learn.dls.test))
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(4, 5e-3)
    made = dict(standard=learn.frozen_copy())
    _train(learn, 6)
    made['adversarial'] = learn.frozen_copy()
    for bits in (4, 1):
        learn.quantize(bits)
        _train(learn, 2)
        made[f'{bits} bits'] = learn.frozen_copy()
    return made,x,y

@pytest.mark.parametrize('name', ['standard', 'adversarial', '4 bits', '1 bits'])
def test_escalation_of_an_ordinary_network_ends_in_trust(nets, name):
    made,x,y = nets
    report = evaluate(made[name], x, y, PGD(.1, steps=5), escalate=True, progress=False)
    assert report.verdict=='trusted' and report.escalated and not report.broken and not report.left_out, report
    assert report.robust<=report.robust_after['PGD-5']

@pytest.mark.parametrize('norm,eps', [('l1', 4.), ('l0', 3)])
def test_escalation_of_budgets_that_autoattack_does_not_know(nets, norm, eps):
    made,x,y = nets
    report = evaluate(made['adversarial'], x, y, FGSM(eps, norm=norm), escalate=True, progress=False)
    assert report.verdict=='trusted' and report.robust<=report.robust_after['PGD-100']
    rounded = nn.Sequential(Then(lambda x: (x*31).round()/31), made['standard'])
    report = evaluate(rounded, x, y, FGSM(eps, norm=norm), escalate=True, progress=False)
    assert report.verdict=='gradient masking' and report.broken and report.robust<.1

class Flipped(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x): return x.clone()
    @staticmethod
    def backward(ctx, grad): return -grad

def _without_grad(x):
    with torch.no_grad(): return (x*31).round()/31

def _shifted(x): return torch.roll(x, tuple(torch.randint(-1, 2, (2,)).tolist()), (2, 3))

wrappers = dict(
    rounding=lambda m: nn.Sequential(Then(lambda x: (x*31).round()/31), m),
    without_grad=lambda m: nn.Sequential(Then(_without_grad), m),
    temperature=lambda m: nn.Sequential(m, Then(lambda z: z*1e4)),
    softmax=lambda m: nn.Sequential(m, nn.Softmax(1)),
    noise=lambda m: nn.Sequential(Then(lambda x: x+.02*torch.randn_like(x)), m),
    numpy=lambda m: lambda x: torch.from_numpy(m(x).detach().numpy()),
    detached=lambda m: nn.Sequential(Then(lambda x: x.detach()), m),
    flipped=lambda m: nn.Sequential(Then(Flipped.apply), m),
    logits=lambda m: nn.Sequential(m, Then(lambda z: (z*4).round()/4)),
    shifts=lambda m: nn.Sequential(Then(_shifted), m),
    shattered=lambda m: nn.Sequential(Then(lambda x: (x+1e-3*torch.sin(1e4*x))), m))

@pytest.fixture(scope='module')
def truth(nets):
    "Robust accuracy of what is wrapped"
    made,x,y = nets
    return contest_run('standard', made['standard'], x, y, .1)['robust']

@pytest.mark.parametrize('name', wrappers)
def test_what_hides_gradients_is_got_around(nets, truth, name):
    made,x,y = nets
    torch.manual_seed(0)
    first = Square(.1, queries=20) if name in ('numpy', 'detached', 'without_grad') else PGD(.1, steps=5)
    report = evaluate(wrappers[name](made['standard']), x, y, first, escalate=True, progress=False)
    print(name, truth, report, report.seconds)
    assert report.robust<=truth+.10, report
    assert report.verdict=='gradient masking' and report.broken, report
