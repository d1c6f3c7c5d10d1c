"""Two weights as bitsandbytes stores them, with the values bitsandbytes decodes from them.

Provenance: bitsandbytes 0.50.2 on torch 2.12.1, CPU. After torch.manual_seed(0), w = torch.randn(5, 48) * 0.02 in fp32;
`quantize_4bit(w, blocksize=64, compress_statistics=nested, quant_type=kind)` gave the packed weight ("x.weight") and the
state whose `as_dict(packed=True)` gave the keys after it; "dequantized" is `dequantize_4bit` of them. Rows of 48 cross
blocks of 64, and the last block holds 48. Kept as zlib-packed safetensors in base64. Numbers of our own: no model's.
"""

import base64
import zlib

from safetensors.torch import load


def bnb_tensors(kind):
    """The tensors of the file, "dequantized" among them: "nf4" is nested, "fp4" is not."""
    return load(zlib.decompress(base64.b64decode(FILES[kind])))


FILES = {
    "nf4": (
        "eNqNlgtsU1UYxzeeOpQQEATiXCmLGK1ju7fve28rMBWciMyA8mhG59p1sFFmazY3hyACOjCI4KAjEBwYFHyNCXTtva0P1AAdPpdBHCrgEzQqvt"
        "AY8P/vuBHiSGxycs75fd/3/77zuOm5sU9G+ldvLPNVP+RdGK6o85UZnZiGH17kMzqNt4uC0WQMBbyczbGYzHaPyVjmDXtLgn5/yBcOgeabHNZ8"
        "T4PJWJtX46soD4TzFvpCYV9Zibc0VOWtvbxcwX+1oAQ1c29q6fpKqryLLi8oWKy9SZpNBQ67/RLN/yFW0IsWdUxCvkW4WOxiiRn2ixWEfFMva2"
        "S8SSiwXSKS99/NukTL3IsOJKhj7WVlobA37MsrrQiHvAvLSh8O+0IlJQv95suXarX1msBqEkSz6GloMKR/1T9tUdleWXoozrZh+ZNy9lFR5vja"
        "xyZqRz5rldp2davs2Xi39nyoymz0oa1/21CNMXosGW1F+dkK2bLFd6fnjL9h4u8yGznz0kZN9rQznnP2+pi+jNf5rL+nKHpextHOehivr0Nfg7"
        "4m5tzbuiodx8baGPva0Wz10Myn5bvdarp5Jn+hPv/MDIXcUn+lPPK1azSO9Xbm1RdU+g1cuynOONZUcWux/MO5B9PrIKMffRhPP+pRh3bGs+lx"
        "70z/KZ2Tvmzw1ejLOOHsSomNvrqdjbmYhzoX9LWMCz9y+ug56Mt6AuWj02uiHmujH3NXvVSvzl16Os7+ja7r5KP33yezzyzOUSZN25HWELvvlL"
        "4rtKhHOo+pw0YF4uSMiWR3SJzTznHqtjaZvc51G7Whp+lj2vWYpqrVMvX0GGowFzlr0X1p45h5dX/Ww/rIOGbPePpneb6WdW3m5Jwx1CRjY8yp"
        "rbnquXWT5FT14J4m26WDQx+V95/ojMc+aEmf72O1B1Ta6MfGOXvGTrF9mI6hL+No45g2fUyfY2vL0jEFU2Lp85zxywZ1zcHiOPN80jpEoQZzkN"
        "GPnPGcU4uN+oxjT03EaV9mbpVFcXGyOVKXzMioSeJTT3akgklRrAQLgPnAvGAesNlgM8HuBZsGVgQ2GawQbAKYAuZImkUrmAA2HuxmsHFguWAG"
        "sGywUWDDwYaCDQYbBDYwmUr1hV5GUhD/TOCmJ1KpU4nmyMmE39+dEMVOsMNg74IlwaJgrWA7wVrANoGtT5jFp8BWJCKRBtiDiY7UPPBisEL4WM"
        "DGgY0EywI7q5nFT7Xlpw9of9y4Xyv3J7SubVFt8vHdWvT6l7Wb5u7QmiPPaVldm7T6a5q009Of1jxrGrWO1OOYL8b4QU3JKtdyls/B93OPdryu"
        "UHv7N7u2bdEt0BwDvRHQytKKo+fU4a98o3Zt+0BtjrSrnjUtas7yVerbvwXUycedapmUo47sN0LtSF2lLn22rzpf/TX+8dQTcenz9+PbF2nxq/"
        "vsiofXbYwfy10Rb6wsj89dMzF+y+7s+N8v/hzb/OOO2HlfTcz17azYkvly7M3vr49lBjNjy068197/m9Xtg7rGthflxKJtPzZGzUts0QETd+87"
        "37/PvvWjZ+/dt23YHt4l9BbMreA22G3ws8Pfjjg74h3QcUDPAV0n9J3I40Q+J/I6kd+JOpyoR0JdEuqTUKeEeiXULaF+CeuQsB4J65KwPhnrlL"
        "FeGeuWsX4Z+yBjP2Tsi4z9kbFPMvZLxr7BnqVgHxXsp4J9VbC/CvZZwX4r2HcF+6/gHBSch4JzwbhRwTlh3qTg3BScn4JzVHCeCs5VwflCL6Hg"
        "vKF5QMH5Q+usgvvgwr1w4X64cE9cuC8u3BuweWBBF+4T2AoX7hf4evhscuHege2EvRUsCpYEexfsMFgnWDfYSbBTYGdcuNfgGW7cczfuuxv33o"
        "3778Z34Mb3ADYKLBvMAJYLNg7sZrDxYAKYFcwBpoBNACt04/sDKwKbBnYv2Eyw2WAeMC+YDywAVgkWBAuB1YDVgS3GeAlbstUhJPMXDEhuFQ4m"
        "prasTbgtSqK6Npb+Xzj/V4ty8mCu61i/R1zOvi+7otuPu3YNHOJuG+ZIxxf6X/Que6J+r9C8rur5QGr7ffdviNSVbxFmR/1N898XO+ekxs8aPk"
        "NeUHfHngPBa8W6jyKZgZWR9W3zatptt321WrM4Y2dqJ5TOCmyO+Jdd4XjyraZPDm2sKF770PAj34/9bveYop2rPdW7Wl//tjt7wmfShhtKGhdM"
        "L7vL9MX5/WNH1Bt7njc9TxiDkU8ak8FYWhl8YEEIb1cwvPYM+hvHYPRXBr1hPusM+lPHgFesgc9YRPc8LC+OxgvyX0NvKhdMPY8k2PLz8s12q8"
        "1md9gdZtEsmAXB0vAPmEfNfQ=="
    ),
    "fp4": (
        "eNp1VU1ME1EQ1rNJ04Po0XVjPODatFAL2+4WJIBo0ERJCQnBZmt3oVp+TFcBCdo7CYGESPzDkwdKouFCWPoKPYB/qSdTTxhCCG0k0ZMnD8aZ99"
        "62RaDJ5Jv5ZuabeenL2+TxY/Q3Jkb1+w+0ATP2SI+KfgjN0SFd9IuttTWiJCb6NIy6L0ne+h5JjGqmFh40jIRuJoB1S7LP3TMuiSOuYT3W22e6"
        "tEiiXxs5Wsd7UAQkJLnOt0+GbhTu14aOVvL4DpGq80ket3ffSpUKofpKgRq35Dmogf2Sx/PfudhCCVMzdVckZia0gWhk1NQT4bAx5D1yRN0hO6"
        "K05KmphQOPC4LQ1rRCuFltTX6ytDihAKIB588wH/N+zq/IYAo3C3NLiydond3LY+RVznF91mvzYITn5ApUykh9i2nY/ZRXcUZ5zoS9j2yfo+IM"
        "hM2iM1XWQ3dWMddV1UkKy5NKV9U325BTC8sO4B0KWIbVOLhNEqwDtLAPEfKIBK5zknG0TuH9tl6G9xBuMutzqDiT18L8zgyrLc1Hbbns05jrU7"
        "RYD9W2ynNLOXt3fiacS/en5w3mXpNg7gzpcIYQFUAFEUzFHMQWmIz5DmeexozPp8ECDDFPfYWjzVvMp9qZCp2A3QNaCtcLcG2F76Mws/VsrXy6"
        "XJ/n+9FdCM8pXJufhZ6BlHezOVpPtrob0ZRis5PaVnc2UGyeQkwzbLTAJyzXyC1LuA+YRZSxlvcR5juJ7fMa3pMN2JocYY5TZXOdfB6tS5draC"
        "/XnSppQn0G7zTeL/y/UAff1IVUKrCQqm6A69gAfhAowGrAZJDn0xCvQbwG/ipQgNWAydXc3MO9uHHy6pfe/t3H0y1Ptrc1Y3Y68r14eW6g2LF5"
        "+3foa+Hdr42Z2Y83Wnfmc6cvGisFzYi3v3jW+umvq6pl68MVdfrzq8J2xPgRX3x/qicWbjae/rw79/bmuc3z11Prw/ruc/Na+9nQmz+31mPzO7"
        "0zey838hfGRPbEsWdMEPFZkwQxEh+8cy8B3wbgfF4goqWC+KBm4oss2M+dAF8JAT4T4/8Aqh6vkg=="
    ),
}
