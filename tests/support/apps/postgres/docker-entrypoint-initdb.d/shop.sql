create table article (number integer primary key, name text not null, price numeric(9, 2));

insert into article select n, 'article ' || n, n * 1.25 from generate_series(1, 500) as n;

create table release (name text);

insert into release values ('@RELEASE@');

