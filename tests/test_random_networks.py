"Expectation over transformation: attacks on networks that draw random numbers"
from dataclasses import replace
import pytest, torch, torch.nn.functional as F
from torch import Tensor, nn
from fastai.vision.all import Learner, set_seed
from adverfine.threat import ThreatModel
from adverfine.networks.zoo import cnn8
from adverfine.data.pixels import pixels
from adverfine.data.sources import digits_dls
from adverfine.attacks.attack import Attack, value_and_grad
from adverfine.attacks.losses import margin
from adverfine.attacks.scoring import Asked
from adverfine.attacks.gradient import FGSM, PGD
from adverfine.attacks.adaptive import EOT, Transfer
from adverfine.attacks.square import Square
import fastai.callback.progress, fastai.callback.schedule  # noqa: F401 verbs of a Learner

class Noisy(nn.Module):
    "Draws from a generator of its own, in float64; keeps what it drew"
    def __init__(self, net, level=.5):
        super().__init__()
        self.net,self.level,self.drawn = net,level,[]
        self.generator = torch.Generator().manual_seed(0)
    def forward(self, x):
        self.drawn.append(torch.randn(x.shape, generator=self.generator, dtype=torch.float64))
        return self.net(x + self.level*self.drawn[-1].to(x.dtype))

def _net():
    set_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 20), nn.Tanh(), nn.Linear(20, 10)).double()

class Watch(Attack):
    "Keeps logits and gradient of one look at the network"
    def craft(self, model, x, y, generator):
        watched[:] = value_and_grad(model, x, y), value_and_grad(model, x, y, margin)
        return x

watched = []

def test_the_gradient_is_the_average_over_the_same_draws():
    net,x,y = Noisy(_net()),torch.rand(5, 1, 8, 8, dtype=torch.float64),torch.arange(5)
    EOT(Watch(.1), samples=6)(net, x, y)
    assert len(net.drawn)==12
    for (out,_,grad),drawn,loss in zip(watched, (net.drawn[:6], net.drawn[6:]), ('cross_entropy', 'margin')):
        for i in range(5):
            z,jacobians = [],[]
            for noise in drawn:
                look = lambda o: net.net((o+.5*noise[i])[None])[0]
                z.append(look(x[i]))
                jacobians.append(torch.autograd.functional.jacobian(look, x[i]))
            mean = torch.stack(z).mean(0)
            if loss=='cross_entropy': error = mean.softmax(0)-F.one_hot(y[i], 10)
            else: error = F.one_hot((mean-1e9*F.one_hot(y[i], 10)).argmax(), 10)-F.one_hot(y[i], 10).double()
            torch.testing.assert_close(out[i].double(), mean, rtol=1e-6, atol=1e-6, check_dtype=False)
            by_hand = sum(torch.einsum('k,kchw->chw', error, j) for j in jacobians)/6
            torch.testing.assert_close(grad[i], by_hand, rtol=1e-5, atol=1e-7)

def test_log_probabilities_have_the_same_mean_for_every_loss():
    z,y = torch.randn(6, 4, 10, dtype=torch.float64),torch.arange(4)
    logits,log_p = z.mean(0),z.log_softmax(2).mean(0)
    for loss in (F.cross_entropy, margin): torch.testing.assert_close(loss(logits, y), loss(log_p, y))
    gap = F.cross_entropy(z.flatten(0, 1), y.repeat(6))-F.cross_entropy(logits, y)
    assert gap>0                                     # by how much the passes disagree

@pytest.fixture(scope='module')
def trained():
    set_seed(0)
    learn = Learner(digits_dls(), cnn8(size=8))
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(12, 5e-3)
    return learn.model.eval(),*(o.as_subclass(Tensor) for o in pixels(learn.dls.valid))

def test_the_average_gradient_fools_more(trained):
    "Right answers in 20 passes over the images of three runs"
    model,x,y = trained
    def right(attack):
        torch.manual_seed(0)
        noisy,total = lambda o: model(o+.3*torch.randn_like(o)),0
        for k in range(3):
            x_adv = attack(noisy, x, y, torch.Generator().manual_seed(k))
            with torch.no_grad(): total += sum((noisy(x_adv).argmax(1)==y).sum().item() for _ in range(20))
        return total/60/len(x)
    assert right(EOT(PGD(.1, steps=20), samples=8))<right(PGD(.1, steps=20))-.02

def test_modes_flags_and_gradients_are_left_alone(trained):
    model,x,y = trained
    model.train()
    before = [m.training for m in model.modules()],[p.requires_grad for p in model.parameters()]
    with torch.inference_mode(): a = EOT(PGD(.1, steps=2), samples=2)(model, x[:8].clone(), y[:8], _seed())
    assert before==([m.training for m in model.modules()],[p.requires_grad for p in model.parameters()])
    assert all(p.grad is None or not p.grad.any() for p in model.parameters()) and not a.requires_grad
    model.eval()
    torch.testing.assert_close(a, PGD(.1, steps=2)(model, x[:8], y[:8], _seed()), rtol=0, atol=1e-6)

def _seed(): return torch.Generator().manual_seed(0)

def test_fields_names_and_what_is_refused(trained):
    model,x,y = trained
    attack = EOT(PGD(.1, steps=4, step_size=.04, norm='l2', clamp=False), samples=3)
    assert attack.threat==ThreatModel(.1, 'l2', False) and attack.name=='PGD-4 EOT-3' and attack.passes==24
    assert attack.white_box and attack.soft and not EOT(Square(.1)).white_box and not EOT(Square(.1)).soft
    assert EOT(FGSM(.1)).samples==8
    half = attack.scaled(.5)
    assert half==EOT(PGD(.05, steps=4, step_size=.02, norm='l2', clamp=False), samples=3) and half.eps==.05
    assert replace(attack, samples=2)==EOT(attack.attack, 2) and replace(attack, attack=FGSM(.2)).eps==.2
    for n in (0, -1, 1.5):
        with pytest.raises(ValueError, match=f'samples={n} must be a whole number, 1 or more'): EOT(PGD(.1), n)
    with pytest.raises(ValueError, match=r'write Transfer\(EOT\(attack\), surrogate\)'): EOT(Transfer(PGD(.1), model))
    with pytest.raises(ValueError, match='not tuple'): EOT(PGD(.1))(lambda o: (model(o),), x, y)
    with pytest.raises(ValueError, match='gives no gradients'): EOT(PGD(.1))(lambda o: model(o).detach(), x, y)
    asked = []
    def counted(o):
        asked.append(len(o))
        return model(o).detach()
    EOT(Square(1e-3, queries=4), samples=3)(counted, x[:9], y[:9], _seed())
    assert len(asked)>=15 and len(asked)%3==0
    crafted = Transfer(EOT(FGSM(.1), samples=2), model)
    torch.testing.assert_close(crafted(counted, x[:4], y[:4]), FGSM(.1)(model, x[:4], y[:4]), rtol=0, atol=1e-6)

def test_only_the_network_has_the_last_word(trained):
    "What an average is told of, a search may ask the exact network about"
    model,x,y = trained
    seen = []
    class Ask(Attack):
        def craft(self, model, x, y, generator):
            seen.append((hasattr(model, 'exactly'), getattr(model, 'through', None)))
            return x
    asked = Asked(model, None)
    EOT(Ask(.1), samples=2)(asked, x, y)
    EOT(Ask(.1), samples=2)(model, x, y)
    assert seen==[(True, asked), (False, None)]
