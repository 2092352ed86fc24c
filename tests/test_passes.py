"What each attack says that it costs, against what it costs on images that never fall"
import pytest, torch, torchattacks
from torch import nn
from adverfine.attacks.adaptive import EOT, Transfer
from adverfine.attacks.apgd import APGD
from adverfine.attacks.attack import Attack
from adverfine.attacks.autoattack import AutoAttack
from adverfine.attacks.fab import FAB
from adverfine.attacks.fmn import FMN
from adverfine.attacks.gradient import FGSM, FGSMRS, NFGSM, PGD
from adverfine.attacks.saturated import PGDPlusPlus
from adverfine.attacks.scoring import Asked, Scorer
from adverfine.attacks.square import Square
from adverfine.attacks.surrogates import Rescaled, Smoothed
from adverfine.attacks.torchattacks import TorchAttack

class Sure(nn.Module):
    "Always class 0 of `classes`, by an ample margin, with gradients that are not zero"
    def __init__(self, classes=4):
        super().__init__()
        self.w = nn.Parameter(torch.linspace(-1, 1, 16*classes).sin().view(classes, 16))
        self.bonus = nn.Parameter(100.*torch.eye(classes)[0])
    def forward(self, x): return x.flatten(1)@self.w.T+self.bonus

x = torch.rand(5, 1, 4, 4, generator=torch.Generator().manual_seed(0))*.8+.1
y = torch.zeros(5, dtype=torch.long)

def _spent(attack, **kwargs):
    "Passes for an image"
    asked = Asked(Sure(**kwargs))
    attack(asked, x, y, torch.Generator().manual_seed(0))
    return asked.passes/len(x)

kept = [FGSM(.1), FGSMRS(.1), NFGSM(.1), PGD(.1, steps=3), PGD(.1, steps=3, restarts=2), PGD(.1, steps=1, norm='l2'),
        PGD(1, steps=3, norm='l1'), PGD(2, steps=3, norm='l0'), APGD(.1, steps=4), APGD(.1, steps=4, restarts=3),
        APGD(.1, steps=1, norm='l2', loss='margin'), APGD(.1, steps=4, loss='dlr', targets=3),
        APGD(.1, steps=4, loss='dlr', targets=2, restarts=2), FAB(.1, steps=3, targets=3), FAB(.1, steps=2, targets=1),
        FMN(.1, steps=6), FMN(.1, steps=3, norm='l2'), Square(.1, queries=7), Square(1, norm='l2', queries=1),
        Square(2, norm='l0', queries=5), PGDPlusPlus(.1, steps=3), PGDPlusPlus(.1, steps=3, scaling='hns'),
        PGDPlusPlus(.1, steps=3, restarts=2), EOT(PGD(.1, steps=3), samples=3), EOT(Square(.1, queries=3), samples=2),
        TorchAttack(torchattacks.PGD, .1, steps=3), TorchAttack(torchattacks.MIFGSM, .1, steps=2)]

@pytest.mark.parametrize('attack', kept, ids=str)
def test_the_price_is_what_is_paid(attack): assert _spent(attack)==attack.passes

def test_the_whole_autoattack():
    "Also where it runs at once"
    assert _spent(AutoAttack(.1, version='fast'))==AutoAttack(.1, version='fast').passes==83+1+501+1

def test_where_less_is_paid():
    aimed = APGD(.1, steps=3, loss='dlr', targets=9)    # a network of ten classes has nine others
    assert _spent(aimed, classes=10)==aimed.passes and _spent(aimed, classes=4)<aimed.passes
    adaptive = AutoAttack(.1, version='adaptive')       # where nothing falls, hope is soon gone
    assert 0<_spent(adaptive, classes=10)<adaptive.passes/8
    apgd = EOT(APGD(.1, steps=2), samples=4)        # the network is asked once, not four times, who fell
    assert apgd.passes-_spent(apgd)==3
    assert _spent(Transfer(PGD(.1), Sure()))==20    # through the other network, that is
    many = torch.rand(120, 1, 4, 4)                 # the Jacobian is that of a hundred images
    asked = Asked(Sure())
    PGDPlusPlus(.1, steps=3)(asked, many, torch.zeros(120, dtype=torch.long))
    assert asked.passes==120*PGDPlusPlus(.1, steps=3).passes-2*20

def test_an_attack_that_says_nothing_is_a_gradient():
    class Own(Attack): pass
    assert Own(.1).passes==2==FGSM(.1).passes

@pytest.mark.parametrize('attack', [PGD(.1, steps=3), APGD(.1, steps=4), Square(.1, queries=7)], ids=str)
def test_a_judge_looks_once_more(attack):
    judge = Scorer(Sure(), x, y)
    assert judge.run('attack', attack).passes==len(x)*(attack.passes+1)

def test_the_price_of_a_surrogate():
    "A look at a smoothed network is one pass, a gradient one and two for each pair of differences"
    few = Rescaled(Smoothed(Sure(), samples=5))
    for network,price in ((Rescaled(Sure()), 1+2), (Smoothed(Sure()), 1+61), (few, 1+11)):
        asked = Asked(None, network)
        asked(x)
        asked(x.clone().requires_grad_())
        assert asked.passes==len(x)*price
