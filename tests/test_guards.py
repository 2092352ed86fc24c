"Each guard on the smallest network that it must, and must not, complain of"
from dataclasses import dataclass
import pytest, torch
from torch import nn
from adverfine.attacks.attack import Attack
from adverfine.attacks.gradient import FGSM, PGD
from adverfine.attacks.adaptive import Transfer
from adverfine.attacks.apgd import APGD
from adverfine.attacks.square import Square
from adverfine.evaluation.cases import Case, guards
from adverfine.evaluation.guards import _Rescaled, inspect

class Then(nn.Module):
    def __init__(self, f): super().__init__(); self.f = f
    def forward(self, x): return self.f(x)

def _linear(scale=1.):
    "Class 0 where the first two pixels outweigh the last two: the margin is 4 scale (x0+x1-x2-x3)"
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3, bias=False))
    w = torch.tensor([1., 1, -1, -1])
    net[1].weight.data = torch.stack([2*w, -2*w, -8*torch.ones(4)])*scale
    return net.eval()

def _x(n, gap=.02): return (torch.full((n, 4), .5)+torch.tensor([gap, gap, -gap, -gap])).view(n, 1, 2, 2)

def _case(model, n=8, attacks=(PGD(.1),), robust_after=(1.,), gap=.02, **kw):
    x = _x(n, gap)
    kw = dict(stands=torch.ones(n, dtype=torch.bool)) | kw
    return Case(model, x, torch.zeros(n, dtype=torch.long), attacks=attacks, robust_after=robust_after, **kw)

def _measure(name, case): return guards[name].measure(case)
def _value(name, case): return _measure(name, case)[0]

class Counting(nn.Module):
    def __init__(self, net): super().__init__(); self.net,self.calls,self.sizes = net,0,[]
    def forward(self, x):
        self.calls += 1; self.sizes.append(len(x))
        return self.net(x)

def _blind(net=None):
    net = net or _linear()
    return Then(lambda x: net(x).detach())

@dataclass(frozen=True)
class Blacken(Attack):
    "Fools where the first pixel is above .6; notes whom it saw, and the seed of its generator"
    steps:int = 1
    white_box = True
    def craft(self, model, x, y, generator):
        seen.append((model, len(x), generator.initial_seed(), self.steps))
        return torch.where((x[:,:,:1,:1]>.6), 1-x, x)

seen = []

def test_thresholds():
    "What a reader of a report relies on: which number is suspicious, and which guards are for thorough evaluations"
    assert {k: (g.limit, g.thorough) for k,g in guards.items()}==dict(
        budget=(1e-6, False), metric=(0, False), determinism=(1e-4, False), probabilities=(0, False),
        gradients=(0, False), zero_gradient=(0, False), unbounded=(.05, False),
        scaled_margin=(.01, False), black_box=(.002, False), convergence=(.005, True), plateau=(.05, True),
        transfer=(0, False), agreement=(.01, False))

def test_case():
    case = _case(_linear(), 300)
    assert len(case.some()[0])==128 and len(case.some()[1])==128 and len(case.some(5)[0])==5
    assert len(_case(_linear(), 300, thorough=True).some()[0])==300
    fake = _linear()
    assert case.climbed is case.model and _case(_blind(), fake_quantized=fake).climbed is fake
    assert not case.blind and _case(_blind()).blind and not _case(_blind(), fake_quantized=fake).blind
    with torch.no_grad(): assert not case.blind
    assert case.white==[PGD(.1)] and _case(_linear(), attacks=(Square(.1),)).white==[]
    assert _case(_linear(), attacks=(Transfer(PGD(.1), fake),)).white==[PGD(.1)]
    made = _case(_linear(), attacks=(PGD(.1, norm='l2', clamp=False),)).same(APGD, steps=3)
    assert (type(made), made.eps, made.norm, made.clamp, made.steps)==(APGD, .1, 'l2', False, 3)
    assert _case(_linear(), seed=5).generator().initial_seed()==5 and _case(_linear()).generator().initial_seed()==0

@pytest.mark.parametrize('thorough', [False, True])
def test_accuracy_that_an_attack_costs(thorough):
    net,n = _linear(),600
    case = _case(net, n, robust_after=(.9, .5), thorough=thorough)
    case.x[::2,:,:1,:1] = .7                  # every second one falls
    case.stands[:20] = False
    seen.clear()
    assert case.fall(Blacken(1.))==pytest.approx(.5*.5)
    assert sum(o[1] for o in seen)==(580 if thorough else 128) and max(o[1] for o in seen)<=256
    assert all(o[0] is net for o in seen)
    case.stands[:] = False
    assert case.fall(Blacken(1.))==0
    case.stands[:] = True
    other = _linear()
    seen.clear()
    case.fall(Transfer(Blacken(1.), other))
    assert all(o[0] is other for o in seen)

def test_bfloat16_is_for_crafting_only():
    precisions = []
    net = nn.Sequential(*_linear(), Then(lambda z: (precisions.append(torch.is_autocast_enabled('cpu')), z)[1]))
    for bf16 in (False, True):
        precisions.clear()
        _case(net, bf16=bf16).fall(PGD(.1, steps=2))
        assert any(precisions)==bf16 and not precisions[-1]

def test_look():
    net = _linear()
    quiet = {o.guard for o in inspect(_case(net))}
    assert {'budget', 'metric', 'determinism', 'scaled_margin'}<=quiet
    assert not {'convergence', 'plateau', 'transfer', 'agreement'}&quiet
    assert {'convergence', 'plateau'}<={o.guard for o in inspect(_case(net, thorough=True))}
    case = _case(net)
    case.x,case.y,case.stands = case.x[:0],case.y[:0],case.stands[:0]
    assert inspect(case)==()
    net.train()
    [found] = [o for o in inspect(_case(net, clean=.5, robust_after=(.5,))) if o.guard=='metric']
    assert net.training and found.ok and found.value==0==found.limit and str(found).startswith('ok')
    [found] = [o for o in inspect(_case(net, clean=.5, robust_after=(.75,))) if o.guard=='metric']
    assert not found.ok and found.value==.25 and found.source=='definition of robust accuracy'
    assert str(found).startswith('FLAGGED')

def test_budget():
    assert _value('budget', _case(None, far=.1))==0==_value('budget', _case(None, far=.05))
    assert _value('budget', _case(None))==_case(None).far==0 and _case(None).clean==1
    assert _value('budget', _case(None, far=.1+2e-6))==pytest.approx(2e-6)
    assert 'beyond' in _measure('budget', _case(None, far=.1+2e-6))[1]
    assert 'no adv' in _measure('budget', _case(None, far=.1+5e-7))[1]

def test_determinism():
    net = Counting(_linear())
    assert _value('determinism', _case(net))==0 and net.calls==5
    def late(by, big=1.):
        "Logits of length `big`, which move by `by` in the fifth pass"
        calls = []
        def f(x):
            calls.append(1)
            z = torch.tensor([1., 0, 0]).repeat(len(x), 1)*big
            if len(calls)==5: z[-1,1] += by
            return z
        return Then(f)
    assert _value('determinism', _case(late(.01)))==pytest.approx(.01, rel=.01)
    # it is the share of the logits that counts
    assert _value('determinism', _case(late(1., 1000.)))==pytest.approx(.001, rel=.01)
    value,says = _measure('determinism', _case(late(5.)))
    assert value==float('inf') and says.startswith('between 7 and 8 of 8')
    assert _value('determinism', _case(Then(lambda x: torch.zeros(len(x), 3))))==0

@pytest.mark.parametrize('z,flagged', [([.7, .2, .1], 1), ([1., 0, 0], 1), ([.7, .2, .2], 0), ([1.5, -.5, 0], 0),
    ([.8, .4, -.2], 0), ([2., 1, 0], 0), ([.7, .2, .10005], 0)])
def test_probabilities(z, flagged):
    value,says = _measure('probabilities', _case(Then(lambda x: torch.tensor(z).repeat(len(x), 1))))
    assert value==flagged and ('returns probabilities' in says)==bool(flagged)
    mixed = Then(lambda x: torch.stack([torch.tensor(z), torch.tensor([3., 2, 1])]).repeat(len(x)//2, 1))
    assert _value('probabilities', _case(mixed))==0

def test_gradients():
    assert _value('gradients', _case(_blind()))==1 and _value('gradients', _case(_linear()))==0
    assert 'no gradients' in _measure('gradients', _case(_blind()))[1]
    assert 'can be' in _measure('gradients', _case(_linear()))[1]

def test_zero_gradient():
    net = _linear()
    half = Then(lambda x: torch.where((x[:,0,0,0]>.6)[:,None], net(x).detach(), net(x)))
    case = _case(half, 600, thorough=True)
    case.x[:150,:,:1,:1] = .7
    assert _value('zero_gradient', case)==.25
    # some pixels without a gradient are no reason
    one = Then(lambda x: net(torch.cat([x[:,:,:1], x[:,:,1:].detach()], 2)))
    assert _value('zero_gradient', _case(one))==0
    assert _measure('zero_gradient', _case(_blind())) is None and net[1].weight.requires_grad

def test_unbounded():
    net = Counting(_linear())
    # is it blind, twenty steps, a verdict
    assert _value('unbounded', _case(net, 100, gap=.2))==0 and net.sizes==[1]+[64]*21
    stubborn = Then(lambda x: torch.tensor([1., 0, 0])+0*x.flatten(1)[:,:1])
    assert _value('unbounded', _case(stubborn))==1 and _measure('unbounded', _case(_blind())) is None

def test_the_margin_is_taken_on_rescaled_logits():
    "In l2 a step along a gradient of 1e-20 is no step, unless the logits are brought to unit size before"
    attacks = PGD(.1, norm='l2', steps=20),
    weak = _case(_linear(1e-20), attacks=attacks, gap=.049)
    assert weak.fall(attacks[0])==0 and weak.fall(APGD(.1, norm='l2', loss='margin'))==0
    assert _value('scaled_margin', weak)==1
    assert _value('scaled_margin', _case(_linear(), attacks=attacks, gap=.2))==0
    net = Counting(_linear())
    _measure('scaled_margin', _case(net, gap=.2))
    assert net.calls==1+21+2
    assert _measure('scaled_margin', _case(_blind())) is None
    assert _measure('scaled_margin', _case(_linear(), fake_quantized=_linear())) is None

def test_rescaled_logits_have_unit_size_and_a_constant_scale():
    net,x = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)),torch.rand(5, 1, 2, 2, requires_grad=True)
    for scale in (1e-20, 1., 1e6):
        big = Then(lambda x: net(x)*scale)
        out = _Rescaled(big)(x)
        floor = 1e-12/scale if scale<1e-6 else 0
        torch.testing.assert_close(out, net(x)/net(x).std(1, keepdim=True).clamp_min(floor))
        grad = torch.autograd.grad(out[:,0].sum(), x)[0]
        rescaled = net(x)[:,0]/net(x).detach().std(1).clamp_min(floor)
        torch.testing.assert_close(grad, torch.autograd.grad(rescaled.sum(), x)[0])
    assert _Rescaled(Then(lambda x: torch.zeros(2, 3)))(x).tolist()==[[0]*3]*2

def test_black_box():
    net = _linear()
    two = dict(attacks=(PGD(.1), Square(.1, queries=5)), robust_after=(.9, .6))
    # what Square took is known
    assert _value('black_box', _case(net, **two))==pytest.approx(.3)
    # unless all is wanted: then it is run on what stands
    assert _value('black_box', _case(net, thorough=True, **two))==pytest.approx(.6)
    first = dict(attacks=(Square(.1, queries=5), PGD(.1)), robust_after=(.9, .6))
    assert _value('black_box', _case(net, **first))==pytest.approx(.6)
    assert _value('black_box', _case(net, gap=.2))==0
    assert _measure('black_box', _case(net, attacks=(Square(.1),))) is None
    for thorough,queries in (False, 100), (True, 2000):
        watched = Counting(net)
        _measure('black_box', _case(watched, 1, gap=.3, thorough=thorough))
        assert watched.calls==queries+2

def test_convergence():
    @dataclass(frozen=True)
    class Slow(Blacken):
        def craft(self, model, x, y, generator):
            seen.append(self.steps)
            return 1-x if self.steps>=6 else x
    net = _linear()
    seen.clear()
    assert _value('convergence', _case(net, attacks=(Slow(.1, 3),), robust_after=(.5,)))==.5 and seen==[6]
    assert _value('convergence', _case(net, attacks=(Slow(.1, 2),)))==0
    assert _value('convergence', _case(net, attacks=(FGSM(.1), Slow(.1, 3))))==1
    # nothing to double: PGD
    assert _value('convergence', _case(net, attacks=(FGSM(.1),)))==1
    assert _value('convergence', _case(net, attacks=(FGSM(.1),), gap=.2))==0
    assert _measure('convergence', _case(net, attacks=(Square(.1),))) is None
    assert _measure('convergence', _case(_blind())) is None
    assert _measure('convergence', _case(net, fake_quantized=net)) is None

def test_plateau():
    net = _linear()
    value = lambda steps: _value('plateau', _case(net, attacks=(FGSM(.1), PGD(.1, steps=steps)), gap=.2))
    assert value(10)==1 and .2<value(11)<1 and value(60)<1e-4
    assert _value('plateau', _case(net, attacks=(FGSM(.1),), gap=.2))==0                       # one step, one loss
    assert net[1].weight.requires_grad
    assert _measure('plateau', _case(net, attacks=(Square(.1),))) is None
    assert _measure('plateau', _case(_blind())) is None

def test_transfer():
    net = _linear()
    child = nn.Sequential(Then(lambda x: (x*100).round()/100), net).eval()
    assert _value('transfer', _case(child, 300, parent=net))==1
    stands = torch.ones(300, dtype=torch.bool)
    stands[:240] = False
    assert _value('transfer', _case(child, 300, parent=net, stands=stands))==pytest.approx(.2)
    assert _value('transfer', _case(child, 300, parent=net, gap=.2))==0
    few = _case(child, 300, parent=net, gap=.2)
    few.stands[:] = False
    assert _value('transfer', few)==0 and 'fool 0 more' in _measure('transfer', few)[1]
    assert _measure('transfer', _case(child)) is None
    assert _measure('transfer', _case(child, attacks=(Square(.1),), parent=net)) is None

def test_agreement():
    net = _linear()
    fake = Then(lambda x: torch.where((x[:,0,0,0]>.6)[:,None], -net(x), net(x)))
    case = _case(net, 600, fake_quantized=fake)
    case.x[:150,:,:1,:1] = .7
    assert _value('agreement', case)==.25 and _value('agreement', _case(net, fake_quantized=_linear()))==0
    assert _measure('agreement', _case(net)) is None
