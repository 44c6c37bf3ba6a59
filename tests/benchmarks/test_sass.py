"""Instructions of loops are counted as a hand counts them."""

from kernels.benchmarks import sass

LISTING = """
.text.attend:
        /*0000*/                   MOV R1, R2 ;
.L_x_0:
        /*0010*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24 ;
.L_x_1:
        /*0020*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [R3+URZ], R2 ;
        /*0030*/              @!P1 BRA `(.L_x_1) ;
        /*0040*/                   HGMMA.64x64x16.F32.BF16 R24, R8, gdesc[UR8], R24, gsb0 ;
        /*0050*/                   MUFU.EX2 R7, R7 ;
        /*0060*/               @P0 BRA `(.L_x_0) ;
.L_x_2:
        /*0070*/                   FADD R1, R2, R3 ;
        /*0080*/               @P0 BRA `(.L_x_2) ;
        /*0090*/                   EXIT ;
.L_x_3:
        /*00a0*/                   NANOSLEEP.SYNCS 0x989680 ;
        /*00b0*/                   BRA `(.L_x_0) ;
.text.other:
        /*0000*/                   EXIT ;
"""


def test_loops_with_products_are_found_and_counted():
    (loop,) = sass.loops(LISTING)  # neither the wait, nor the sum, nor what lies behind the end
    assert loop == sass.Loop("attend", instructions=6, tensor_cycles=64 + 32, exponential_cycles=8)
    assert loop.most == 1.0
    assert sass.Loop("x", instructions=200, tensor_cycles=100, exponential_cycles=50).most == 0.5
