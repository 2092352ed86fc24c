"PGD++: temperatures against Jacobians and Hessians in float64; networks of few bits whose softmax is saturated"
import math
import pytest, torch, torch.nn.functional as F
from torch import Tensor, nn
from fastai.vision.all import Learner, set_seed
from adverfine.networks.zoo import cnn8
from adverfine.data.pixels import pixels
from adverfine.data.sources import digits_dls
from adverfine.attacks.attack import input_grad
from adverfine.attacks.gradient import PGD
from adverfine.attacks.saturated import PGDPlusPlus, hessian_temperature, jacobian, jacobian_temperature
from adverfine.attacks.saturated import _Tempered, unsure_temperature
from adverfine.attacks.scoring import score
import adverfine.compression.quantization, fastai.callback.progress, fastai.callback.schedule  # noqa: F401 verbs

def _seed(n=0): return torch.Generator().manual_seed(n)

def _pieces(scale=1., classes=4):
    "Straight pieces, in float64"
    set_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(9, 12), nn.ReLU(), nn.Linear(12, classes)).double()
    with torch.no_grad():
        for p in net[3].parameters(): p *= scale
    return net

def _images(n=6): return torch.rand(n, 1, 3, 3, generator=_seed(1), dtype=torch.float64)

def test_jacobians_and_their_mean_singular_value():
    net,x = _pieces(),_images()
    jac,values = jacobian(net, x),[]
    for i in range(6):
        by_hand = torch.autograd.functional.jacobian(lambda o: net(o[None])[0], x[i]).flatten(1)
        torch.testing.assert_close(jac[i].double(), by_hand, rtol=1e-5, atol=1e-6)
        values += torch.linalg.eigvalsh(by_hand@by_hand.T).clamp_min(0).sqrt().tolist()
    torch.testing.assert_close(jacobian_temperature(jac).item(), len(values)/sum(values), rtol=1e-5, atol=0)

def test_the_right_class_stays_away_from_certainty():
    "By the formula of the paper, and by what it is for"
    out = torch.tensor([[90., 20, 0, -10], [1, .5, 0, -1], [0, 50, -40, 1], [-9, 0, 8, 60]], dtype=torch.float64)
    y,rho = torch.tensor([0, 0, 1, 0]),.01
    beta = unsure_temperature(out, y, rho)
    for i,(gamma,sure) in enumerate([(100, True), (2, False), (90, True), (69, False)]):
        expected = -math.log(rho/(3*(1-rho)))/gamma if sure else 1
        assert abs(beta[i].item()-expected)<1e-12
    p = (beta[:,None]*out).softmax(1).gather(1, y[:,None])[:,0]
    assert (p[[0, 2]]<=1-rho+1e-9).all()
    worst = torch.tensor([[30., 0, 0, 0]], dtype=torch.float64)           # where the bound is attained
    p = (unsure_temperature(worst, y[:1], rho)*worst).softmax(1)[0,0].item()
    assert abs(p-(1-rho))<1e-9

def test_the_temperature_of_the_largest_hessian():
    "Every number of the grid, with the Hessian by double differentiation"
    net,x = _pieces(30.),_images(24)
    y = net(x).argmax(1)
    found = hessian_temperature(net(x).detach(), y, jacobian(net, x).double())
    for i in range(24):
        top = net(x[i:i+1])[0].topk(2).values.tolist()
        gap,d = top[0]-top[1],4
        low,high = (-math.log(rest/((1-rest)*(d-1)))/gap for rest in (1-1/d-.01, 1e-72))
        norms = []
        for k in range(100):
            beta = low+(high-low)*k/99
            loss = lambda o: F.cross_entropy(beta*net(o[None]), y[i:i+1])
            norms.append(torch.autograd.functional.hessian(loss, x[i]).norm().item())
        k = max(range(100), key=norms.__getitem__)
        assert 0<k<99
        torch.testing.assert_close(found[i].item(), low+(high-low)*k/99, rtol=1e-5, atol=0)
    assert hessian_temperature(net(x).detach(), (y+1)%4, jacobian(net, x).double()).tolist()==[1]*24

@pytest.mark.parametrize('scaling', ['njs', 'hns'])
@pytest.mark.parametrize('classes', [2, 4])
def test_the_steps_are_those_of_pgd_on_scaled_logits(scaling, classes):
    "The attack once more, with the temperatures by hand"
    net,x = _pieces(100., classes),_images()
    y = net(x).argmax(1)
    attack = PGDPlusPlus(.1, steps=4, scaling=scaling)
    x_adv = attack.threat.random_start(x, _seed(3))
    found = attack(net, x, y, _seed(3))
    jac = jacobian(net, x_adv).double()
    if scaling=='njs': first = jacobian_temperature(jac).expand(6)
    else: first = hessian_temperature(net(x_adv).detach(), y, jac)
    for _ in range(4):
        beta = first
        if scaling=='njs': beta = beta*unsure_temperature(beta[:,None]*net(x_adv).detach(), y)
        grad = input_grad(lambda o: beta[:,None]*net(o), x_adv, y)
        x_adv = attack.threat.project(x_adv+2.5*.1/4*grad.sign(), x)
    torch.testing.assert_close(found, x_adv, rtol=1e-5, atol=1e-6)

def test_the_jacobian_is_that_of_the_first_hundred_images():
    net,x = _pieces(),_images(130).requires_grad_()
    tempered = _Tempered(PGDPlusPlus(.1), net, net(x).argmax(1))
    beta = jacobian_temperature(jacobian(net, x[:100]))
    torch.testing.assert_close(tempered(x), beta*net(x).float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(tempered(x[:130]*.5), beta*net(x*.5).float(), rtol=1e-5, atol=1e-6)

class Large(nn.Module):
    "The same decisions, and a softmax that is 0 or 1"
    def __init__(self, net): super().__init__(); self.net = net
    def forward(self, x): return 1000*self.net(x)

@pytest.fixture(scope='module', params=[1, 2])
def few_bits(request):
    set_seed(0)
    learn = Learner(digits_dls(), cnn8(size=8))
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(8, 5e-3)
        learn.quantize(request.param)
        learn.fit_one_cycle(6, 2e-3)
    return Large(learn.model).eval(),*(o.as_subclass(Tensor) for o in pixels(learn.dls.valid))

@pytest.mark.parametrize('scaling', ['njs', 'hns'])
def test_it_finds_what_pgd_does_not_in_networks_of_few_bits(few_bits, scaling):
    model,x,y = few_bits
    pgd,plus = (score(model, a, x, y) for a in (PGD(.1, steps=20), PGDPlusPlus(.1, scaling=scaling)))
    assert pgd.clean.float().mean()>.8
    fell,more = ((o.clean & ~o.stands).float().mean() for o in (pgd, plus))
    assert more>fell+.1

def test_fields_and_what_they_refuse():
    net,x = _pieces(),_images()
    y = net(x).argmax(1)
    attack = PGDPlusPlus(.1)
    assert (attack.name, attack.steps, attack.passes, attack.soft, attack.white_box)==('PGD++', 20, 43, False, True)
    assert attack.scaled(.5)==PGDPlusPlus(.05)
    for kw,why in [(dict(scaling='x'), "'njs' or 'hns'"), (dict(rho=0), 'rho=0'), (dict(rho=.5), 'rho=0.5'),
            (dict(steps=0), 'steps=0'), (dict(restarts=0), 'restarts=0'), (dict(step_size=0), 'step_size=0')]:
        with pytest.raises(ValueError, match=why): PGDPlusPlus(.1, **kw)
    for bad,labels,why in [(lambda o: net(o).detach(), y, 'gives no gradients'), (lambda o: (net(o),), y, 'not tuple'),
            (lambda o: net(o)[:,:1], 0*y, 'PGD.. needs 2 classes'), (net, F.one_hot(y, 4).float(), 'needs labels')]:
        for scaling in ('njs', 'hns'):
            with pytest.raises(ValueError, match=why): PGDPlusPlus(.1, scaling=scaling)(bad, x, labels)
    flat = lambda o: torch.tensor([3., 2, 1]).repeat(len(o), 1)+0*o.flatten(1)[:,:1]
    for scaling in ('njs', 'hns'):
        attack = PGDPlusPlus(.1, scaling=scaling, restarts=2, norm='l2')
        for model in (net, flat): attack.threat.check(attack(model, x, 0*y), x)
