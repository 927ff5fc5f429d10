"""English."""

from data_builders.synthesis.wording import Product, Wording

WORDING = Wording(
    answer="Answer: ",
    names=("Anna", "Ben", "Clara", "David"),
    products=(  # all start with a consonant: "a notebook"
        Product("notebook", "notebooks"),
        Product("mug", "mugs"),
        Product("backpack", "backpacks"),
        Product("lamp", "lamps"),
        Product("pillow", "pillows"),
        Product("towel", "towels"),
    ),
    goods=("rice", "sugar", "flour", "coffee"),
    questions={
        "unit_price": (
            "{weight} kg of {good} costs {price}. How much does {wanted} kg cost?",
            "{name} pays {price} for {weight} kg of {good}. At the same price per kg, how much does {wanted} kg cost?",
        ),
        "discount": (
            "One {item} costs {price}. {name} buys {count} of them at {percent}% off. How much does {name} pay?",
            "A shop gives {percent}% off all {items}. The normal price is {price} each. "
            "How much do {count} {items} cost now?",
        ),
        "voucher": (
            "{name} buys {count} {items} at {price} each. A voucher takes {off} off orders of at least {minimum}. "
            "How much does {name} pay?",
            "One {item} costs {price}. A voucher gives {off} off if you spend {minimum} or more. "
            "How much do {count} {items} cost?",
        ),
        "bundle": (
            "One {item} costs {first} and one {other} costs {second}. A set of both costs {pack}. "
            "How much do you save by buying {count} sets?",
            "Bought separately, a {item} is {first} and a {other} is {second}; a set of both is {pack}. "
            "{name} buys {count} sets. How much does {name} save?",
        ),
        "shipping": (
            "{name} orders {count} {items} at {price} each. Shipping costs {fee} but is free for orders of "
            "{free_from} or more. What is the total?",
            "A shop charges {fee} for shipping; orders of at least {free_from} ship free. "
            "How much do {count} {items} at {price} each cost with shipping?",
        ),
        "change": (
            "{name} buys {count} {items} at {price} each and one {other} for {extra}, and pays with {paid}. "
            "How much change does {name} get?",
            "One {item} costs {price} and one {other} costs {extra}. {name} buys {count} {items} and one {other} "
            "and hands over {paid}. How much is the change?",
        ),
        "stock": (
            "A shop has {start} {items}. {orders} customers buy {each} each, then {delivered} more arrive. "
            "How many {items} are there now?",
            "There are {start} {items} in stock. {orders} orders of {each} {items} go out and {delivered} {items} "
            "come in. How many are in stock now?",
        ),
        "comparison": (
            "{small} {items} cost {small_price} in one shop; {large} {items} cost {large_price} in another. "
            "How much cheaper is one {item} in the cheaper shop?",
            "A pack of {small} {items} costs {small_price} and a pack of {large} costs {large_price}. "
            "How much do you save per {item} with the better offer?",
        ),
    },
    checks=("Let me check: {check}. Correct.", "I check it backwards: {check}. That fits."),
)
