"""Tagalog (Filipino)."""

from data_builders.synthesis.wording import Wording, uninflected

WORDING = Wording(
    answer="Sagot: ",
    names=("Ana", "Jose", "Maria", "Pedro"),
    products=uninflected("tasa", "plato", "unan", "bag", "payong", "sumbrero"),
    goods=("bigas", "asukal", "harina", "kape"),
    questions={
        "unit_price": (
            "Ang {weight} kg ng {good} ay nagkakahalaga ng {price}. Magkano ang {wanted} kg ng {good}?",
            "Bumili si {name} ng {weight} kg ng {good} sa halagang {price}. Sa parehong presyo bawat kilo, "
            "magkano ang {wanted} kg?",
        ),
        "discount": (
            "Ang isang {item} ay {price}. Bumili si {name} ng {count} {item} na may {percent}% na diskuwento. "
            "Magkano ang babayaran ni {name}?",
            "May {percent}% na diskuwento ang lahat ng {item} sa tindahan. Ang dating presyo ng bawat isa ay {price}. "
            "Magkano na ngayon ang {count} {item}?",
        ),
        "voucher": (
            "Bumili si {name} ng {count} {item} na {price} ang bawat isa. May voucher na nagbabawas ng {off} kapag "
            "umabot sa {minimum} ang binili. Magkano ang babayaran ni {name}?",
            "Ang isang {item} ay {price}. May bawas na {off} ang voucher kapag hindi bababa sa {minimum} ang binili. "
            "Magkano ang babayaran para sa {count} {item}?",
        ),
        "bundle": (
            "Ang isang {item} ay {first} at ang isang {other} ay {second}. Ang isang set ng dalawa ay {pack}. "
            "Magkano ang matitipid sa pagbili ng {count} set?",
            "Kung bibilhin nang hiwalay, {first} ang {item} at {second} ang {other}; {pack} naman ang isang set. "
            "Bumili si {name} ng {count} set. Magkano ang natipid ni {name}?",
        ),
        "shipping": (
            "Umorder si {name} ng {count} {item} na {price} ang bawat isa. Ang bayad sa padala ay {fee}, pero libre "
            "ito kapag umabot sa {free_from} ang order. Magkano lahat ang babayaran?",
            "Sa isang tindahan, {fee} ang bayad sa padala at libre ito sa mga order na {free_from} pataas. "
            "Magkano lahat ang {count} {item} na {price} ang bawat isa, kasama ang padala?",
        ),
        "change": (
            "Bumili si {name} ng {count} {item} na {price} ang bawat isa at isang {other} na {extra}, at nagbayad "
            "ng {paid}. Magkano ang sukli ni {name}?",
            "Ang isang {item} ay {price} at ang isang {other} ay {extra}. Bumili si {name} ng {count} {item} at "
            "isang {other}, at nag-abot ng {paid}. Magkano ang sukli?",
        ),
        "stock": (
            "May {start} {item} sa tindahan. Bumili ang {orders} suki ng tig-{each} {item}, at may dumating pang "
            "{delivered}. Ilan na ngayon ang {item}?",
            "May {start} {item} sa bodega. Lumabas ang {orders} order na may tig-{each} {item}, at pumasok ang "
            "{delivered} {item}. Ilan na ngayon ang nasa bodega?",
        ),
        "comparison": (
            "Sa unang tindahan, ang {small} {item} ay {small_price}; sa ikalawa, ang {large} {item} ay {large_price}. "
            "Magkano ang matitipid sa bawat {item} sa mas murang tindahan?",
            "Ang pakete ng {small} {item} ay {small_price} at ang pakete ng {large} ay {large_price}. "
            "Magkano ang matitipid sa bawat {item} sa mas murang pakete?",
        ),
    },
    checks=("Suriin natin: {check}. Tama.", "Balikan ang kuwenta: {check}. Tugma."),
)
