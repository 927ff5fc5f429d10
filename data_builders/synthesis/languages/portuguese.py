"""Portuguese, of Brazil."""

from data_builders.synthesis.wording import Product, Wording

WORDING = Wording(
    answer="Resposta: ",
    names=("Ana", "Bruno", "Carla", "Diego"),
    products=(  # all masculine: "um caderno", "os cadernos"
        Product("caderno", "cadernos"),
        Product("copo", "copos"),
        Product("prato", "pratos"),
        Product("travesseiro", "travesseiros"),
        Product("boné", "bonés"),
        Product("relógio", "relógios"),
    ),
    goods=("arroz", "açúcar", "feijão", "café"),
    questions={
        "unit_price": (
            "O preço de {weight} kg de {good} é {price}. Qual é o preço de {wanted} kg de {good}?",
            "{name} pagou {price} por {weight} kg de {good}. Pelo mesmo preço por quilo, quanto custam {wanted} kg?",
        ),
        "discount": (
            "Um {item} custa {price}. {name} compra {count} {items} com {percent}% de desconto. Quanto {name} paga?",
            "A loja dá {percent}% de desconto em todos os {items}. O preço normal é {price} cada. "
            "Quanto custam agora {count} {items}?",
        ),
        "voucher": (
            "{name} compra {count} {items} por {price} cada. Um cupom dá {off} de desconto em compras a partir de "
            "{minimum}. Quanto {name} paga?",
            "Um {item} custa {price}. Um cupom desconta {off} se a compra for de no mínimo {minimum}. "
            "Quanto custam {count} {items}?",
        ),
        "bundle": (
            "Um {item} custa {first} e um {other} custa {second}. O kit com os dois custa {pack}. "
            "Quanto se economiza comprando {count} kits?",
            "Separados, um {item} sai por {first} e um {other} por {second}; o kit com os dois sai por {pack}. "
            "{name} compra {count} kits. Quanto {name} economiza?",
        ),
        "shipping": (
            "{name} pede {count} {items} por {price} cada. O frete custa {fee}, mas é grátis em pedidos a partir de "
            "{free_from}. Qual é o total?",
            "Uma loja cobra {fee} de frete; pedidos de no mínimo {free_from} têm frete grátis. "
            "Quanto custam {count} {items} por {price} cada, com o frete?",
        ),
        "change": (
            "{name} compra {count} {items} por {price} cada e um {other} por {extra}, e paga com {paid}. "
            "Quanto {name} recebe de troco?",
            "Um {item} custa {price} e um {other} custa {extra}. {name} compra {count} {items} e um {other} e "
            "entrega {paid}. De quanto é o troco?",
        ),
        "stock": (
            "Uma loja tem {start} {items}. {orders} clientes compram {each} cada um e depois chegam mais {delivered}. "
            "Quantos {items} há agora?",
            "Há {start} {items} no estoque. Saem {orders} pedidos de {each} {items} e entram {delivered} {items}. "
            "Quantos há agora no estoque?",
        ),
        "comparison": (
            "Em uma loja, {small} {items} custam {small_price}; em outra, {large} {items} custam {large_price}. "
            "Quanto se economiza por {item} na loja mais barata?",
            "Um pacote com {small} {items} custa {small_price} e um com {large} custa {large_price}. "
            "Quanto se economiza por {item} na melhor oferta?",
        ),
    },
    checks=("Conferindo: {check}. Certo.", "Conta inversa: {check}. Confere."),
)
